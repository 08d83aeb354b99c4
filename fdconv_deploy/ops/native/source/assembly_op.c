/* `fdconv::FrequencyAssembly*` as custom operators of ONNX Runtime.
 *
 * One operator per form, each under the name of the model-local function that it takes the place
 * of (fdconv_deploy/ops/frequency_assembly/function.py). Inputs are declared as one variadic one,
 * since forms differ in their number only. `fdconv.nchwc::FrequencyAssembly` takes every form's
 * place in a blocked graph (fdconv_deploy/runtime/blocked_graph.py).
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"
#include "op.h"

enum { MOST_STAGES = 3, FORMS = 3 * MOST_STAGES * MOST_STAGES * 16 };

typedef struct {
    Op head;
    Form form;
} AssemblyOp;

typedef struct {
    Kernel head;
    Assembly assembly;
} AssemblyKernel;

static AssemblyOp ops[FORMS], blocked_op;

/* A number that need not be there: where a gate begins among the attentions, a loan's. */
static OrtStatus *read_optional(const Kernel *kernel, const OrtKernelInfo *info,
                                const char *name, int *to) {
    int64_t value;
    OrtStatus *status = kernel->api->KernelInfoGetAttribute_int64(info, name, &value);
    if (status)
        kernel->api->ReleaseStatus(status);
    else if (value < 0 || value > MOST_LENGTH)
        return failure(kernel, unknown);
    else
        *to = (int)value;
    return NULL;
}

static OrtStatus *read_node(const Kernel *kernel, const OrtKernelInfo *info, Node *node) {
    const OrtApi *api = kernel->api;
    memset(node, 0, sizeof *node);
    node->form = &((const AssemblyOp *)kernel->op)->form;
    CHECK(api->KernelInfo_GetInputCount(info, &node->count));
    if (node->count > MOST_INPUTS) return failure(kernel, "it has too many inputs");
    for (size_t i = 0; i < node->count; i++) {
        CHECK(read_constant(kernel, info, i, &node->inputs[i]));
    }
    CHECK(read_int(kernel, info, "out_channels", &node->out_channels));
    CHECK(read_int(kernel, info, "in_channels", &node->in_channels));
    CHECK(read_int(kernel, info, "taps", &node->taps));
    node->filter_at = node->spatial_at = node->channel_at = node->lent = -1;
    node->constants = node->inputs + 1;
    CHECK(read_optional(kernel, info, "lent", &node->lent));
    if (node->lent >= 0) node->constants = lent(node->lent);
    if (!node->constants) return failure(kernel, "nobody lends its constants");
    if (node->form->blocked) {
        CHECK(read_int(kernel, info, "block", &node->block));
        CHECK(read_int(kernel, info, "scaled", &node->scaled));
        CHECK(read_optional(kernel, info, "filter_at", &node->filter_at));
        CHECK(read_optional(kernel, info, "spatial_at", &node->spatial_at));
        CHECK(read_optional(kernel, info, "channel_at", &node->channel_at));
    } else
        CHECK(read_int(kernel, info, "by_rows", &node->by_rows));
    CHECK(read_ints(kernel, info, "row_frequencies", &node->row_frequencies, &node->slots));
    CHECK(read_ints(kernel, info, "column_frequencies", &node->column_frequencies, &node->places));
    return read_pair(kernel, info, "kernel_size", &node->kernel_height, &node->kernel_width);
}

static OrtStatus *make(Kernel *kernel, const OrtKernelInfo *info) {
    Node node;
    OrtStatus *status = read_node(kernel, info, &node);
    if (!status) {
        const char *problem = assembly_make(&((AssemblyKernel *)kernel)->assembly, &node);
        if (problem) status = failure(kernel, problem);
    }
    free(node.row_frequencies);
    free(node.column_frequencies);
    return status;
}

static void release(Kernel *kernel) { assembly_free(&((AssemblyKernel *)kernel)->assembly); }

#define kernels run->kernels
STEP(rows, AssemblyRun, rows_workspace(run->assembly))
STEP(columns, AssemblyRun, columns_workspace(run->assembly))
#undef kernels

static OrtStatus *compute(void *op_kernel, OrtKernelContext *context) {
    const Kernel *kernel = op_kernel;
    const Assembly *a = &((const AssemblyKernel *)op_kernel)->assembly;
    AssemblyRun run = {.assembly = a, .kernels = &kernels_for_block(a->block)->assembly,
                       .scale_rows = 1};
    Tensor tensor;
    CHECK(read_input(kernel, context, 0, &tensor));
    if (tensor.rank != 2 || !elements(&tensor, ORT_FLOAT) || tensor.shape[1] < a->attentions)
        return failure(kernel, "its attention is not (B, n) float32");
    run.batch = (int)tensor.shape[0];
    run.attentions = (int)tensor.shape[1];
    run.attention = tensor.data;
    if (a->local_at >= 0) {
        CHECK(read_input(kernel, context, a->local_at, &tensor));
        if (tensor.rank != 2 || tensor.type != ORT_FLOAT || tensor.shape[0] != run.batch ||
            tensor.shape[1] != a->in_channels)
            return failure(kernel, "its local_input is not (B, I)");
        run.average = tensor.data;
    }
    if (a->column_scale_at >= 0) {
        CHECK(read_input(kernel, context, a->column_scale_at, &tensor));
        int rows = tensor.rank == 4 && elements(&tensor, ORT_FLOAT) ? (int)tensor.shape[2] : 0;
        if ((rows != 1 && rows != a->kernel_height) || tensor.shape[0] != run.batch ||
            tensor.shape[3] != a->columns)
            return failure(kernel, "its column_scale is not (B, 1, kh or 1, C)");
        run.column_scale = tensor.data;
        run.scale_rows = rows;
    }
    if (a->row_scale_at >= 0) {
        CHECK(read_input(kernel, context, a->row_scale_at, &tensor));
        if (tensor.rank != 4 || !elements(&tensor, ORT_FLOAT) ||
            tensor.shape[1] != a->out_channels || tensor.shape[2] != 1 || tensor.shape[3] != 1 ||
            (tensor.shape[0] != 1 && tensor.shape[0] != run.batch))
            return failure(kernel, "its row_scale is not (B or 1, O, 1, 1)");
        run.row_scale = tensor.data;
        run.row_scale_step = tensor.shape[0] == 1 ? 0 : a->out_channels;
    }

    int rest = a->kernel_height * a->kernel_width;
    if ((a->filter_at >= 0 && a->filter_at + a->out_channels > run.attentions) ||
        (a->channel_at >= 0 && a->channel_at + a->in_channels > run.attentions) ||
        (a->spatial_at >= 0 && a->spatial_at + rest > run.attentions))
        return failure(kernel, "its attention has fewer gates than it scales kernels by");
    int64_t block = a->block ? a->block : 1;
    int64_t filters = (a->out_channels + block - 1) / block * block;
    int64_t channels = (a->in_channels + block - 1) / block * block;
    int64_t shape[4] = {run.batch * filters, channels, a->kernel_height, a->kernel_width};
    if (a->by_rows) {
        shape[0] = run.batch;
        shape[1] = a->out_channels;
        shape[2] = a->kernel_height;
        shape[3] = a->columns;
    }
    CHECK(make_output(kernel, context, 0, shape, 4, &run.output));

    /* Where tiles are full, the half-inverted matrix takes exactly the kernels' room, and every
     * pair of row tiles its own kernels': the second half may then work in place. */
    size_t kernel_size = (size_t)(filters * channels) * rest;
    run.half_step = (size_t)a->row_tiles * a->kernel_height * a->column_tiles * LANES * PAIR;
    float *own = NULL;
    if (run.half_step == kernel_size && filters == (int64_t)a->row_tiles * LANES &&
        (uintptr_t)run.output % 64 == 0)
        run.half = run.output;
    else
        run.half = own = aligned(run.batch * run.half_step * sizeof(float));
    if (!run.half) return failure(kernel, no_memory);
    size_t pairs = (size_t)run.batch * ((a->row_tiles + 1) / 2);
    OrtStatus *status = parallel(kernel, context, run_rows, a->column_tiles, &run);
    if (!status && !run.failed) status = parallel(kernel, context, run_columns, pairs, &run);
    free(own);
    if (!status && run.failed) status = failure(kernel, no_memory);
    return status;
}

static void make_op(AssemblyOp *op, int number) {
    Form *form = &op->form;
    static const char *const kinds[] = {"_Pointwise", "", "_ByRows"};
    const char *kind = kinds[number % 3];
    number /= 3;
    form->column_stages = 1 + number % MOST_STAGES;
    number /= MOST_STAGES;
    form->row_stages = 1 + number % MOST_STAGES;
    number /= MOST_STAGES;
    int planes = number & 1;
    form->local = number >> 1 & 1;
    form->column_scale = number >> 2 & 1;
    form->row_scale = number >> 3 & 1;
    char stages[16] = "";
    if (form->column_stages != MOST_STAGES || form->row_stages != MOST_STAGES)
        snprintf(stages, sizeof stages, "_Stages%dx%d", form->column_stages, form->row_stages);
    op->head = (Op){.least_inputs = 3, .kernel_size = sizeof(AssemblyKernel), .make = make,
                    .compute = compute, .release = release};
    snprintf(op->head.name, sizeof op->head.name, "FrequencyAssembly%s%s%s%s%s%s",
             kind, stages, planes ? "_Planes" : "", form->local ? "" : "_NoLocal",
             form->column_scale ? "" : "_NoColumnScale", form->row_scale ? "" : "_NoRowScale");
}

OrtStatus *assembly_register(OrtCustomOpDomain *domain, OrtCustomOpDomain *blocked,
                             const OrtApi *api) {
    for (int i = 0; i < FORMS; i++) {
        make_op(&ops[i], i);
        CHECK(add_op(domain, api, &ops[i].head));
    }
    blocked_op = (AssemblyOp){
        {.least_inputs = 1, .kernel_size = sizeof(AssemblyKernel), .make = make,
         .compute = compute, .release = release, .name = "FrequencyAssembly"},
        {.blocked = 1},
    };
    return add_op(blocked, api, &blocked_op.head);
}
