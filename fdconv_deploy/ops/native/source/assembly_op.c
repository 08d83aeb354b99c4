/* `fdconv::FrequencyAssembly*` as custom operators of ONNX Runtime.
 *
 * One operator per form, each under the name of the model-local function that it takes the place
 * of (fdconv_deploy/ops/frequency_assembly/function.py). Inputs are declared as one variadic one,
 * since forms differ in their number only.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "node.h"
#include "op.h"

enum { MOST_STAGES = 3, FORMS = 3 * MOST_STAGES * MOST_STAGES * 16 };

typedef struct {
    OrtCustomOp op; /* first, so that the runtime's pointer to it is one to this */
    Form form;
    char name[112];
} AssemblyOp;

typedef struct {
    const OrtApi *api;
    Assembly assembly;
} AssemblyKernel;

static const AssemblyKernels *kernels;
static AssemblyOp ops[FORMS];

static const char *get_name(const OrtCustomOp *op) { return ((const AssemblyOp *)op)->name; }
static int least(const OrtCustomOp *op) {
    (void)op;
    return 6;
}

static OrtStatus *read_node(const AssemblyOp *op, const OrtApi *api, const OrtKernelInfo *info,
                            Node *node) {
    memset(node, 0, sizeof *node);
    node->form = &op->form;
    CHECK(api->KernelInfo_GetInputCount(info, &node->count));
    if (node->count > MOST_INPUTS) return failure(api, op->name, "it has too many inputs");
    for (size_t i = 0; i < node->count; i++) {
        CHECK(read_constant(api, info, i, &node->inputs[i]));
    }
    size_t rank = 4;
    CHECK(api->KernelInfoGetAttributeArray_int64(info, "kernel_shape", node->kernel_shape, &rank));
    if (rank != 4) return failure(api, op->name, "its kernel_shape is not of four numbers");
    if (op->form.local) {
        int64_t spread[6];
        size_t count = 6;
        CHECK(api->KernelInfoGetAttributeArray_int64(info, "local_spread", spread, &count));
        node->kernel_width = (int)spread[5] + 1;
    }
    return NULL;
}

static OrtStatus *create(const OrtCustomOp *custom, const OrtApi *api, const OrtKernelInfo *info,
                         void **out) {
    const AssemblyOp *op = (const AssemblyOp *)custom;
    Node node;
    CHECK(read_node(op, api, info, &node));
    AssemblyKernel *kernel = calloc(1, sizeof *kernel);
    if (!kernel) return failure(api, op->name, "there is not enough memory");
    kernel->api = api;
    const char *problem = assembly_make(&kernel->assembly, &node);
    if (problem) {
        free(kernel);
        return failure(api, op->name, problem);
    }
    *out = kernel;
    return NULL;
}

static void destroy(void *kernel) {
    assembly_free(&((AssemblyKernel *)kernel)->assembly);
    free(kernel);
}

static void run_rows(void *data, size_t unit) {
    AssemblyRun *run = data;
    float *work = workspace(rows_workspace(run->assembly));
    if (work)
        kernels->rows(run, unit, work);
    else
        run->failed = 1;
}

static void run_columns(void *data, size_t unit) {
    AssemblyRun *run = data;
    float *work = workspace(columns_workspace(run->assembly));
    if (work)
        kernels->columns(run, unit, work);
    else
        run->failed = 1;
}

static OrtStatus *compute(void *op_kernel, OrtKernelContext *context) {
    AssemblyKernel *kernel = op_kernel;
    const OrtApi *api = kernel->api;
    const Assembly *a = &kernel->assembly;
    AssemblyRun run = {.assembly = a, .scale_rows = 1};
    Tensor tensor;
    CHECK(read_input(api, context, 0, &tensor));
    if (tensor.rank != 2 || tensor.type != ORT_FLOAT || tensor.shape[1] < a->attentions)
        return failure(api, "FrequencyAssembly", "its attention is not (B, n) float32");
    run.batch = (int)tensor.shape[0];
    run.attentions = (int)tensor.shape[1];
    run.attention = tensor.data;
    if (a->local_at >= 0) {
        CHECK(read_input(api, context, a->local_at, &tensor));
        if (tensor.rank != 2 || tensor.shape[0] != run.batch || tensor.shape[1] != a->in_channels)
            return failure(api, "FrequencyAssembly", "its local_input is not (B, I)");
        run.average = tensor.data;
    }
    if (a->column_scale_at >= 0) {
        CHECK(read_input(api, context, a->column_scale_at, &tensor));
        int rows = tensor.rank == 4 ? (int)tensor.shape[2] : 0;
        if ((rows != 1 && rows != a->kernel_height) || tensor.shape[0] != run.batch ||
            tensor.shape[3] != a->columns)
            return failure(api, "FrequencyAssembly", "its column_scale is not (B, 1, kh or 1, C)");
        run.column_scale = tensor.data;
        run.scale_rows = rows;
    }
    if (a->row_scale_at >= 0) {
        CHECK(read_input(api, context, a->row_scale_at, &tensor));
        if (tensor.rank != 4 || tensor.shape[1] != a->out_channels ||
            (tensor.shape[0] != 1 && tensor.shape[0] != run.batch))
            return failure(api, "FrequencyAssembly", "its row_scale is not (B or 1, O, 1, 1)");
        run.row_scale = tensor.data;
        run.row_scale_step = tensor.shape[0] == 1 ? 0 : a->out_channels;
    }

    int64_t shape[4] = {(int64_t)run.batch * a->out_channels, a->in_channels, a->kernel_height,
                        a->kernel_width};
    if (a->by_rows) {
        shape[0] = run.batch;
        shape[1] = a->out_channels;
        shape[2] = a->kernel_height;
        shape[3] = a->columns;
    }
    OrtValue *output;
    void *data;
    CHECK(api->KernelContext_GetOutput(context, 0, shape, 4, &output));
    CHECK(api->GetTensorMutableData(output, &data));
    run.output = data;

    /* Where tiles are full, the half-inverted matrix takes exactly the kernels' room, and every
     * pair of row tiles its own kernels': the second half may then work in place. */
    size_t kernel_size = (size_t)a->rows * a->columns;
    run.half_step = (size_t)a->row_tiles * a->kernel_height * a->column_tiles * LANES * PAIR;
    float *own = NULL;
    if (run.half_step == kernel_size && (uintptr_t)data % 64 == 0)
        run.half = run.output;
    else
        run.half = own = aligned_alloc(64, run.batch * run.half_step * sizeof(float));
    if (!run.half) return failure(api, "FrequencyAssembly", "there is not enough memory");
    /* As many batches as units: threads take them as they come. */
    size_t tiles = (size_t)a->column_tiles;
    size_t pairs = (size_t)run.batch * ((a->row_tiles + 1) / 2);
    OrtStatus *status = api->KernelContext_ParallelFor(context, run_rows, tiles, tiles, &run);
    if (!status && !run.failed)
        status = api->KernelContext_ParallelFor(context, run_columns, pairs, pairs, &run);
    free(own);
    if (!status && run.failed)
        status = failure(api, "FrequencyAssembly", "there is not enough memory");
    return status;
}

static const AssemblyKernels *best_kernels(void) {
    switch (instruction_set()) {
#if defined(__x86_64__)
    case 2: return &assembly_avx512;
    case 1: return &assembly_avx2;
#endif
    default: return &assembly_baseline;
    }
}

static void make_op(AssemblyOp *op, int number) {
    Form *form = &op->form;
    int kind = number % 3;
    form->spatial = kind == 1;
    form->by_rows = kind == 2;
    number /= 3;
    form->column_stages = 1 + number % MOST_STAGES;
    number /= MOST_STAGES;
    form->row_stages = 1 + number % MOST_STAGES;
    number /= MOST_STAGES;
    form->planes = number & 1;
    form->local = number >> 1 & 1;
    form->column_scale = number >> 2 & 1;
    form->row_scale = number >> 3 & 1;
    char stages[16] = "";
    if (form->column_stages != MOST_STAGES || form->row_stages != MOST_STAGES)
        snprintf(stages, sizeof stages, "_Stages%dx%d", form->column_stages, form->row_stages);
    snprintf(op->name, sizeof op->name, "FrequencyAssembly%s%s%s%s%s%s",
             kind == 0 ? "_Pointwise" : kind == 2 ? "_ByRows" : "", stages,
             form->planes ? "_Planes" : "", form->local ? "" : "_NoLocal",
             form->column_scale ? "" : "_NoColumnScale", form->row_scale ? "" : "_NoRowScale");
    op->op = variadic_op();
    op->op.GetName = get_name;
    op->op.GetVariadicInputMinArity = least;
    op->op.CreateKernelV2 = create;
    op->op.KernelComputeV2 = compute;
    op->op.KernelDestroy = destroy;
}

OrtStatus *assembly_register(OrtCustomOpDomain *domain, const OrtApi *api) {
    kernels = best_kernels();
    for (int i = 0; i < FORMS; i++) {
        make_op(&ops[i], i);
        CHECK(api->CustomOpDomain_Add(domain, &ops[i].op));
    }
    return NULL;
}
