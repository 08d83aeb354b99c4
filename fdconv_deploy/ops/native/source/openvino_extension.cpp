/* The operators inside OpenVINO: an extension that hosts them by ONNX Runtime's C interface.
 *
 * The operators know one runtime, by the few functions of ort_api.h. Here these functions are
 * OpenVINO's: `create_extensions` registers the operators as ONNX Runtime would, and gives the ONNX
 * frontend a converter for each. A node keeps the inputs that are known at run time only: constants
 * were laid out anew when its kernel was made, and OpenVINO drops them.
 *
 * The CPU plugin runs such a node by `evaluate`, on plain float32 tensors whatever the precision of
 * the nodes around it, and within its own arena of threads, which TBB's loops keep to. Its
 * convolutions keep channels last, and plain tensors cost a slow reordering: the transpositions
 * around a band modulation cost a copy at most.
 */
#include <tbb/parallel_for.h>

#include <memory>
#include <openvino/core/extension.hpp>
#include <openvino/frontend/onnx/extension/conversion.hpp>
#include <openvino/op/constant.hpp>
#include <openvino/op/op.hpp>
#include <openvino/op/reduce_mean.hpp>

#define _Static_assert static_assert
extern "C" {
#include "ort_api.h"
OrtStatus *RegisterCustomOps(OrtSessionOptions *options, const OrtApiBase *base);
}

struct OrtStatus {
    std::string message;
};
struct OrtValue {
    void *data;
    ov::element::Type type;
    ov::Shape shape;
};
struct OrtTensorTypeAndShapeInfo {
    const OrtValue *value;
};
struct OrtKernelInfo {
    const ov::frontend::NodeContext &node;
    std::vector<OrtValue> constants;  // no data where an input is none
};
struct OrtKernelContext {
    std::vector<OrtValue> inputs;
    ov::TensorVector &outputs;
    std::vector<OrtValue> written;
};
struct OrtCustomOpDomain {
    std::string name;
    std::vector<const OrtCustomOp *> ops;
};

namespace {

using ov::frontend::onnx::ConversionExtension;

// Constants that kernels read at run time, such as a BatchNorm's scales, are not larger.
constexpr size_t kept_bytes = 1 << 16;

std::vector<std::unique_ptr<OrtCustomOpDomain>> domains;

OrtStatus *unsupported() { return new OrtStatus{"OpenVINO's host lacks a function of ort_api.h"}; }

OrtStatus *create_status(int, const char *message) { return new OrtStatus{message}; }

int type_code(const ov::element::Type &type) {
    if (type == ov::element::f32) return ORT_FLOAT;
    if (type == ov::element::u8) return ORT_UINT8;
    return type == ov::element::i32 ? ORT_INT32 : ORT_UNDEFINED;
}

template <class T>
OrtStatus *attribute(const OrtKernelInfo *info, const char *name, T *to) {
    if (!info->node.has_attribute(name)) return new OrtStatus{std::string("no attribute ") + name};
    *to = info->node.get_attribute<T>(name);
    return nullptr;
}

const OrtApi *get_api(uint32_t) {
    static const OrtApi api = [] {
        OrtApi a;
        void **functions = reinterpret_cast<void **>(&a);
        std::fill_n(functions, sizeof a / sizeof *functions, reinterpret_cast<void *>(unsupported));
        a.CreateStatus = create_status;
        a.ReleaseStatus = [](OrtStatus *status) { delete status; };
        a.CreateCustomOpDomain = [](const char *name, OrtCustomOpDomain **out) -> OrtStatus * {
            domains.push_back(std::make_unique<OrtCustomOpDomain>());
            *out = domains.back().get();
            (*out)->name = name;
            return nullptr;
        };
        a.CustomOpDomain_Add = [](OrtCustomOpDomain *to, const OrtCustomOp *op) -> OrtStatus * {
            to->ops.push_back(op);
            return nullptr;
        };
        a.AddCustomOpDomain = [](OrtSessionOptions *, OrtCustomOpDomain *) -> OrtStatus * {
            return nullptr;
        };
        a.ReleaseCustomOpDomain = [](OrtCustomOpDomain *) {};
        a.GetTensorMutableData = [](OrtValue *value, void **out) -> OrtStatus * {
            *out = value->data;
            return value->data ? nullptr : new OrtStatus{"a constant is not kept for runs"};
        };
        a.GetTensorTypeAndShape = [](const OrtValue *value,
                                     OrtTensorTypeAndShapeInfo **out) -> OrtStatus * {
            *out = new OrtTensorTypeAndShapeInfo{value};
            return nullptr;
        };
        a.ReleaseTensorTypeAndShapeInfo = [](OrtTensorTypeAndShapeInfo *info) { delete info; };
        a.GetTensorElementType = [](const OrtTensorTypeAndShapeInfo *info,
                                    int *out) -> OrtStatus * {
            *out = type_code(info->value->type);
            return nullptr;
        };
        a.GetDimensionsCount = [](const OrtTensorTypeAndShapeInfo *info,
                                  size_t *out) -> OrtStatus * {
            *out = info->value->shape.size();
            return nullptr;
        };
        a.GetDimensions = [](const OrtTensorTypeAndShapeInfo *info, int64_t *out,
                             size_t count) -> OrtStatus * {
            for (size_t i = 0; i < count; i++) out[i] = (int64_t)info->value->shape[i];
            return nullptr;
        };
        a.KernelInfo_GetInputCount = [](const OrtKernelInfo *info, size_t *out) -> OrtStatus * {
            *out = info->constants.size();
            return nullptr;
        };
        a.KernelInfoGetConstantInput_tensor = [](const OrtKernelInfo *info, size_t index,
                                                 int *constant,
                                                 const OrtValue **out) -> OrtStatus * {
            *out = &info->constants[index];
            *constant = (*out)->data != nullptr;
            return nullptr;
        };
        a.KernelInfoGetAttribute_int64 = [](const OrtKernelInfo *info, const char *name,
                                            int64_t *out) -> OrtStatus * {
            return attribute(info, name, out);
        };
        a.KernelInfoGetAttribute_float = [](const OrtKernelInfo *info, const char *name,
                                            float *out) { return attribute(info, name, out); };
        a.KernelInfoGetAttributeArray_int64 = [](const OrtKernelInfo *info, const char *name,
                                                 int64_t *out, size_t *count) -> OrtStatus * {
            std::vector<int64_t> values;
            if (OrtStatus *status = attribute(info, name, &values)) return status;
            if (out) std::copy(values.begin(), values.end(), out);
            *count = values.size();
            return nullptr;
        };
        a.KernelContext_GetInputCount = [](const OrtKernelContext *context,
                                           size_t *out) -> OrtStatus * {
            *out = context->inputs.size();
            return nullptr;
        };
        a.KernelContext_GetInput = [](const OrtKernelContext *context, size_t index,
                                      const OrtValue **out) -> OrtStatus * {
            *out = &context->inputs[index];
            return nullptr;
        };
        a.KernelContext_GetOutput = [](OrtKernelContext *context, size_t index,
                                       const int64_t *shape, size_t rank,
                                       OrtValue **out) -> OrtStatus * {
            ov::Shape found(shape, shape + rank);
            context->outputs[index].set_shape(found);
            context->written[index] = {context->outputs[index].data(), ov::element::f32, found};
            *out = &context->written[index];
            return nullptr;
        };
        a.KernelContext_ParallelFor = [](const OrtKernelContext *, void (*run)(void *, size_t),
                                         size_t total, size_t, void *data) -> OrtStatus * {
            tbb::parallel_for(size_t(0), total, [=](size_t unit) { run(data, unit); });
            return nullptr;
        };
        return a;
    }();
    return &api;
}

void check(OrtStatus *status) {
    if (!status) return;
    std::string message = status->message;
    delete status;
    OPENVINO_THROW(message);
}

enum Kind { assembly, bands, attention };

/* A node's kernel, shared by its clones, and the inputs that a run reads. */
struct Hosted {
    const OrtCustomOp *op = nullptr;
    void *kernel = nullptr;
    Kind kind = assembly;
    std::vector<OrtValue> inputs;  // constants; of the others, where runs' data go
    std::vector<size_t> at_run;    // which these are
    std::vector<std::shared_ptr<ov::op::v0::Constant>> kept;
    std::vector<ov::PartialShape> shapes;  // of the outputs

    ~Hosted() {
        if (kernel) op->KernelDestroy(kernel);
    }

    void run(OrtKernelContext &context) const {
        // An average, as the only token that there is to average.
        ov::Shape &shape = context.inputs[0].shape;
        if (kind == attention) shape = {shape[0], 1, shape[1]};
        check(op->KernelComputeV2(kernel, &context));
    }
};

class Node : public ov::op::Op {
public:
    OPENVINO_OP("Node", "fdconv");

    Node(const ov::OutputVector &inputs, std::shared_ptr<Hosted> hosted)
        : Op(inputs), hosted_(std::move(hosted)) {
        constructor_validate_and_infer_types();
    }

    void validate_and_infer_types() override {
        for (size_t i = 0; i < hosted_->shapes.size(); i++)
            set_output_type(i, ov::element::f32, hosted_->shapes[i]);
    }

    std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector &inputs) const override {
        return std::make_shared<Node>(inputs, hosted_);
    }

    bool visit_attributes(ov::AttributeVisitor &) override { return true; }

    bool has_evaluate() const override { return true; }

    bool evaluate(ov::TensorVector &outputs, const ov::TensorVector &inputs) const override {
        OrtKernelContext context{hosted_->inputs, outputs,
                                 std::vector<OrtValue>(outputs.size())};
        for (size_t i = 0; i < inputs.size(); i++) {
            const ov::Tensor &tensor = inputs[i];
            context.inputs[hosted_->at_run[i]] = {const_cast<void *>(tensor.data()),
                                                  tensor.get_element_type(), tensor.get_shape()};
        }
        hosted_->run(context);
        return true;
    }

private:
    std::shared_ptr<Hosted> hosted_;
};

/* The mean over all positions of features or tokens: by OpenVINO, in their own layout. */
ov::Output<ov::Node> averaged(const ov::Output<ov::Node> &x) {
    bool tokens = x.get_partial_shape().rank() == 3;
    std::vector<int64_t> positions = tokens ? std::vector<int64_t>{1} : std::vector<int64_t>{2, 3};
    auto axes = ov::op::v0::Constant::create(ov::element::i64, {positions.size()}, positions);
    return std::make_shared<ov::op::v1::ReduceMean>(x, axes, false);
}

std::vector<ov::PartialShape> attention_shapes(const ov::frontend::NodeContext &node,
                                               const ov::PartialShape &average) {
    int64_t gates = 0;
    for (int64_t size : node.get_attribute<std::vector<int64_t>>("head_sizes")) gates += size;
    std::vector<ov::PartialShape> shapes{{average[0], gates}};
    if (node.get_attribute<int64_t>("local")) shapes.push_back(average);
    return shapes;
}

/* Of an assembly: that of its kernels. */
ov::PartialShape kernels_shape(const ov::frontend::NodeContext &node) {
    ov::PartialShape attention = node.get_input(0).get_partial_shape();
    auto lengths = node.get_attribute<std::vector<int64_t>>("kernel_size");
    int64_t o = node.get_attribute<int64_t>("out_channels");
    int64_t i = node.get_attribute<int64_t>("in_channels");
    if (node.get_attribute<int64_t>("by_rows", 0))
        return {attention[0], o, lengths[0], i * lengths[1]};
    return {attention[0] * ov::Dimension(o), i, lengths[0], lengths[1]};
}

ov::OutputVector convert(const OrtCustomOp *op, Kind kind, const ov::frontend::NodeContext &node) {
    auto hosted = std::make_shared<Hosted>();
    hosted->op = op;
    hosted->kind = kind;
    OrtKernelInfo info{node, {}};
    ov::OutputVector inputs;
    for (size_t i = 0; i < node.get_input_size(); i++) {
        ov::Output<ov::Node> input = node.get_input((int)i);
        auto constant = std::dynamic_pointer_cast<ov::op::v0::Constant>(input.get_node_shared_ptr());
        if (!constant) {
            if (kind == attention) input = averaged(input);
            inputs.push_back(input);
            hosted->at_run.push_back(i);
            info.constants.push_back({nullptr, input.get_element_type(), {}});
            hosted->inputs.push_back({});
            continue;
        }
        OrtValue value{const_cast<void *>(constant->get_data_ptr()), constant->get_element_type(),
                       constant->get_shape()};
        info.constants.push_back(value);
        if (kind == attention || constant->get_byte_size() <= kept_bytes)
            hosted->kept.push_back(constant);
        else
            value.data = nullptr;
        hosted->inputs.push_back(value);
    }
    ov::PartialShape first = inputs[0].get_partial_shape();
    if (kind == attention)
        hosted->shapes = attention_shapes(node, first);
    else
        hosted->shapes = {kind == assembly ? kernels_shape(node) : first};
    check(op->CreateKernelV2(op, get_api(0), &info, &hosted->kernel));
    auto made = std::make_shared<Node>(inputs, hosted);
    made->set_friendly_name(node.get_name());
    return made->outputs();
}

}  // namespace

OPENVINO_EXTENSION_C_API void OV_CREATE_EXTENSION(std::vector<ov::Extension::Ptr> &extensions) {
    static const OrtApiBase base{get_api, nullptr};
    check(RegisterCustomOps(nullptr, &base));
    auto add = [&](const std::string &name, const char *domain, const OrtCustomOp *op, Kind kind) {
        extensions.push_back(std::make_shared<ConversionExtension>(
            name, domain, [=](const ov::frontend::NodeContext &node) {
                return convert(op, kind, node);
            }));
    };
    for (const OrtCustomOp *op : domains[0]->ops) add(op->GetName(op), "fdconv", op, assembly);
    for (const OrtCustomOp *op : domains[1]->ops) {
        const std::string name = op->GetName(op);
        if (name == "KernelAttention") add(name, domains[1]->name.c_str(), op, attention);
        if (name == "FrequencyBandModulation") add(name, domains[1]->name.c_str(), op, bands);
    }
}
