/* `fdconv.nchwc::KernelAttention` as a custom operator of ONNX Runtime: all of a layer's small
 * nodes between its input and its assembly.
 *
 * Inputs: x, hidden weight (A, I) and bias; the norm's weight and, of a LayerNorm, its bias; heads
 * weight (N, A) and bias; the weight and bias of the local attention's norm. Outputs: gates
 * (images, N), and where `local` is set (images, I).
 */
#include <stdlib.h>

#include "kernels.h"
#include "op.h"

enum { X, HIDDEN_WEIGHT, HIDDEN_BIAS, MOST_WEIGHTS = 9 };

typedef struct {
    Kernel head;
    Attention attention;
} AttentionKernel;

static Op op;

/* Whether a constant input is one float32 for each of `rows` (× `columns`, unless 0). */
static int fits(const Tensor *tensor, int rows, int columns) {
    return tensor->data && elements(tensor, ORT_FLOAT) && tensor->rank == (columns ? 2 : 1) &&
           tensor->shape[0] == rows && (!columns || tensor->shape[1] == columns);
}

static OrtStatus *make(Kernel *kernel, const OrtKernelInfo *info) {
    const OrtApi *api = kernel->api;
    Attention *a = &((AttentionKernel *)kernel)->attention;
    Tensor in[MOST_WEIGHTS];
    size_t count, heads;
    int *sizes = NULL;
    CHECK(read_int(kernel, info, "block", &a->block));
    CHECK(read_int(kernel, info, "norm", &a->norm));
    CHECK(read_int(kernel, info, "squared", &a->squared));
    CHECK(read_int(kernel, info, "softmax", &a->softmax));
    CHECK(read_int(kernel, info, "local", &a->local));
    if (a->norm) CHECK(read_float(kernel, info, "norm_epsilon", &a->norm_epsilon));
    if (a->local) CHECK(read_float(kernel, info, "local_epsilon", &a->local_epsilon));
    CHECK(api->KernelInfo_GetInputCount(info, &count));
    size_t wanted = 5 + (a->norm == LAYER_NORM ? 2 : a->norm == RMS_NORM) + 2 * (a->local != 0);
    if (count != wanted || a->norm > RMS_NORM || (a->block && a->block != 8 && a->block != 16))
        return failure(kernel, unknown);
    for (size_t i = 0; i < count; i++) CHECK(read_constant(kernel, info, i, &in[i]));
    if (in[HIDDEN_WEIGHT].rank != 2) return failure(kernel, unknown);
    a->hidden = (int)in[HIDDEN_WEIGHT].shape[0];
    a->channels = (int)in[HIDDEN_WEIGHT].shape[1];

    OrtStatus *status = read_ints(kernel, info, "head_sizes", &sizes, &heads);
    if (!status && heads > MOST_HEADS) status = failure(kernel, unknown);
    a->heads = status ? 0 : (int)heads;
    for (int i = 0; i < a->heads && !status; i++) {
        if (sizes[i] < 1) status = failure(kernel, unknown);
        a->gates += a->sizes[i] = sizes[i];
    }
    free(sizes);
    CHECK(status);

    const Tensor *next = in + HIDDEN_WEIGHT;
    int right = fits(next++, a->hidden, a->channels) && fits(next++, a->hidden, 0);
    if (a->norm) right = right && fits(next++, a->hidden, 0);
    if (a->norm == LAYER_NORM) right = right && fits(next++, a->hidden, 0);
    right = right && fits(next++, a->gates, a->hidden) && fits(next++, a->gates, 0);
    if (a->local) right = right && fits(next++, a->channels, 0) && fits(next++, a->channels, 0);
    return right ? NULL : failure(kernel, unknown);
}

static void release(Kernel *kernel) { (void)kernel; }

#define LOOP(NAME)                                                                            \
    static void run_##NAME(void *run, size_t unit) {                                          \
        ((const AttentionRun *)run)->kernels->NAME(run, unit);                                \
    }
LOOP(sums)
LOOP(hidden)
LOOP(heads)

/* In parallel where there is enough to do, which `numbers` read tell. */
static OrtStatus *loop(const Kernel *kernel, OrtKernelContext *context,
                       void (*step)(void *run, size_t unit), size_t units, size_t numbers,
                       void *run) {
    enum { FEW = 1 << 15 };
    if (units > 1 && numbers > FEW) return parallel(kernel, context, step, units, run);
    for (size_t unit = 0; unit < units; unit++) step(run, unit);
    return NULL;
}

static OrtStatus *weights(const Kernel *kernel, OrtKernelContext *context, int *index,
                          const float **to) {
    Tensor tensor;
    CHECK(read_input(kernel, context, (*index)++, &tensor));
    *to = tensor.data;
    return NULL;
}

static OrtStatus *read_weights(const Kernel *kernel, OrtKernelContext *context, const Attention *a,
                               AttentionRun *run) {
    int next = HIDDEN_WEIGHT;
    CHECK(weights(kernel, context, &next, &run->hidden_weight));
    CHECK(weights(kernel, context, &next, &run->hidden_bias));
    if (a->norm) CHECK(weights(kernel, context, &next, &run->norm_weight));
    if (a->norm == LAYER_NORM) CHECK(weights(kernel, context, &next, &run->norm_bias));
    CHECK(weights(kernel, context, &next, &run->heads_weight));
    CHECK(weights(kernel, context, &next, &run->heads_bias));
    if (a->local) {
        CHECK(weights(kernel, context, &next, &run->local_weight));
        CHECK(weights(kernel, context, &next, &run->local_bias));
    }
    return NULL;
}

static size_t parts(size_t count, size_t of) { return (count + of - 1) / of; }

static OrtStatus *compute(void *op_kernel, OrtKernelContext *context) {
    const Kernel *kernel = op_kernel;
    const Attention *a = &((const AttentionKernel *)op_kernel)->attention;
    const AttentionKernels *kernels = &kernels_for_block(a->block)->attention;
    AttentionRun run = {.attention = a, .kernels = kernels};
    Tensor x;
    CHECK(read_input(kernel, context, X, &x));
    run.tokens = x.rank == 3;
    size_t block = a->block ? a->block : 1, channels = parts(a->channels, block) * block;
    if (!elements(&x, ORT_FLOAT) || (x.rank != 4 && (!run.tokens || a->block)) ||
        x.shape[run.tokens ? 2 : 1] != (int64_t)channels)
        return failure(kernel, "its input is not float32 of the channels it was made for");
    run.images = (int)x.shape[0];
    run.x = x.data;
    run.positions = (size_t)x.shape[run.tokens ? 1 : 2];
    if (!run.tokens) run.positions *= (size_t)x.shape[3];
    run.tile = a->block ? block : run.tokens ? MOST_TILE : 4;
    run.tiles = parts(channels, run.tile);
    run.chunk = a->block || run.tokens ? 4096 : 65536;
    run.chunks = parts(run.positions, run.chunk);
    CHECK(read_weights(kernel, context, a, &run));
    int64_t shape[2] = {run.images, a->gates};
    CHECK(make_output(kernel, context, 0, shape, 2, &run.gates));
    if (a->local) {
        shape[1] = a->channels;
        CHECK(make_output(kernel, context, 1, shape, 2, &run.normalised));
    }

    size_t images = run.images, units = images * run.tiles * run.chunks;
    /* The averages' place is also the hidden layer's norm's. */
    size_t averages = images * a->channels, hidden = images * a->hidden;
    if (averages < hidden) averages = hidden;
    run.sums = (double *)call_space(2 * units * MOST_TILE + averages + hidden);
    if (!run.sums) return failure(kernel, no_memory);
    run.average = (float *)(run.sums + units * MOST_TILE);
    run.hidden = run.average + averages;
    size_t read = images * run.positions * channels, rows = parts(a->hidden, ROWS);
    OrtStatus *status = loop(kernel, context, run_sums, units, read, &run);
    if (!status) {
        for (size_t image = 0; image < images; image++) kernels->averages(&run, image);
        status = loop(kernel, context, run_hidden, rows, (size_t)a->hidden * a->channels, &run);
    }
    if (!status) {
        for (size_t image = 0; image < images; image++) kernels->active(&run, image);
        rows = parts(a->gates, ROWS);
        status = loop(kernel, context, run_heads, rows, (size_t)a->gates * a->hidden, &run);
    }
    if (!status && a->softmax)
        for (size_t image = 0; image < images; image++) kernels->softmax(&run, image);
    return status;
}

OrtStatus *attention_register(OrtCustomOpDomain *domain, const OrtApi *api) {
    op = (Op){.least_inputs = 5, .kernel_size = sizeof(AttentionKernel), .make = make,
              .compute = compute, .release = release, .name = "KernelAttention"};
    return add_op(domain, api, &op);
}
