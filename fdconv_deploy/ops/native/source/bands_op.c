/* `fdconv::FrequencyBandModulation*` as custom operators of ONNX Runtime.
 *
 * Only forms whose channels share their maps, by sigmoids: the published ones. Others stay
 * functions of standard operators.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"
#include "op.h"

enum { X, CONV, CONV_BIAS, MIX, MIX_BIAS, TO_COLUMNS, TO_ROWS, FIRST_BAND };

typedef struct {
    Op head;
    int bands;
} BandsOp;

typedef struct {
    Kernel head;
    Bands bands;
} BandsKernel;

static const BandKernels *kernels;
static BandsOp ops[MOST_BANDS];

static size_t padded(size_t count) { return (count + LANES - 1) / LANES * LANES; }

/* (rows, columns), with rows padded by zeros to `step` floats. */
static float *copy(const float *from, size_t rows, size_t columns, size_t step) {
    float *to = aligned(rows * step * sizeof(float));
    if (!to) return NULL;
    for (size_t r = 0; r < rows; r++)
        for (size_t c = 0; c < step; c++)
            to[r * step + c] = c < columns ? from[r * columns + c] : 0;
    return to;
}

static void release(Kernel *kernel) {
    Bands *bands = &((BandsKernel *)kernel)->bands;
    free(bands->to_columns);
    free(bands->to_rows);
    free(bands->conv);
    free(bands->conv_bias);
    free(bands->mix);
    free(bands->mix_bias);
    for (int j = 0; j < bands->bands; j++) {
        free(bands->band[j].from_rows);
        free(bands->band[j].from_columns);
    }
}

static const char *lay_out(Bands *b, const Tensor *in, int count) {
    b->bands = count;
    for (int i = CONV; i < FIRST_BAND + 2 * count; i++) {
        int rank = i == CONV ? 4 : i == CONV_BIAS ? 1 : 2;
        if (!in[i].data) return "a constant input of it is not constant";
        if (in[i].rank != rank || !elements(&in[i], ORT_FLOAT)) return unknown;
    }
    if (b->height < 1 || b->width < 1) return unknown;
    b->channels = (int)in[CONV].shape[0];
    b->weighted = (int)in[CONV].shape[1];
    b->taps = (int)in[CONV].shape[2];
    b->kept_rows = (int)in[TO_ROWS].shape[0];
    b->kept_columns = (int)(in[TO_COLUMNS].shape[1] / b->parts);
    b->kept_step = padded(b->kept_columns);
    b->wide_step = padded(b->width);
    if (in[CONV].shape[3] != b->taps || b->taps % 2 == 0 || in[MIX].shape[0] != count + 1 ||
        in[MIX].shape[1] != b->weighted || in[TO_COLUMNS].shape[0] != b->width ||
        in[TO_ROWS].shape[1] != (int64_t)b->parts * b->height ||
        in[TO_COLUMNS].shape[1] != (int64_t)b->parts * b->kept_columns ||
        in[CONV_BIAS].shape[0] != b->weighted ||
        elements(&in[MIX_BIAS], ORT_FLOAT) != (size_t)count + 1)
        return unknown;

    int products = b->weighted * b->taps * b->taps;
    const float *conv = in[CONV].data, *to_columns = in[TO_COLUMNS].data;
    b->conv = malloc((size_t)products * b->channels * sizeof(float));
    b->to_columns = aligned(b->parts * b->width * b->kept_step * sizeof(float));
    b->to_rows = copy(in[TO_ROWS].data, 1, (size_t)b->kept_rows * b->parts * b->height,
                      (size_t)b->kept_rows * b->parts * b->height);
    b->conv_bias = copy(in[CONV_BIAS].data, 1, b->weighted, b->weighted);
    b->mix = copy(in[MIX].data, count + 1, b->weighted, b->weighted);
    b->mix_bias = copy(in[MIX_BIAS].data, 1, count + 1, count + 1);
    if (!b->conv || !b->to_columns || !b->to_rows || !b->conv_bias || !b->mix || !b->mix_bias)
        return no_memory;
    for (int c = 0; c < b->channels; c++)
        for (int i = 0; i < products; i++) b->conv[i * b->channels + c] = conv[c * products + i];
    for (int part = 0; part < b->parts; part++)
        for (int w = 0; w < b->width; w++)
            for (size_t f = 0; f < b->kept_step; f++)
                b->to_columns[((size_t)part * b->width + w) * b->kept_step + f] =
                    f < (size_t)b->kept_columns
                        ? to_columns[((size_t)w * b->parts + part) * b->kept_columns + f]
                        : 0;
    for (int j = 0; j < count; j++) {
        const Tensor *from_rows = &in[FIRST_BAND + 2 * j], *from_columns = from_rows + 1;
        Band *band = &b->band[j];
        band->rows = (int)from_rows->shape[1];
        band->columns = (int)(from_columns->shape[0] / b->parts);
        if (from_rows->shape[0] != (int64_t)b->parts * b->height || band->rows > b->kept_rows ||
            band->columns > b->kept_columns || from_columns->shape[1] != b->width ||
            from_columns->shape[0] != (int64_t)b->parts * band->columns)
            return unknown;
        size_t rows = (size_t)b->parts * b->height;
        band->from_rows = copy(from_rows->data, 1, rows * band->rows, rows * band->rows);
        band->from_columns =
            copy(from_columns->data, (size_t)b->parts * band->columns, b->width, b->wide_step);
        if (!band->from_rows || !band->from_columns) return no_memory;
    }
    return NULL;
}

static OrtStatus *make(Kernel *kernel, const OrtKernelInfo *info) {
    const OrtApi *api = kernel->api;
    int bands = ((const BandsOp *)kernel->op)->bands;
    Tensor inputs[FIRST_BAND + 2 * MOST_BANDS];
    memset(inputs, 0, sizeof inputs);
    size_t count;
    CHECK(api->KernelInfo_GetInputCount(info, &count));
    if (count != (size_t)FIRST_BAND + 2 * bands)
        return failure(kernel, "it has another number of inputs than its name says");
    for (size_t i = 0; i < count; i++) CHECK(read_constant(kernel, info, i, &inputs[i]));
    Bands *b = &((BandsKernel *)kernel)->bands;
    int complex_rows;
    CHECK(read_int(kernel, info, "complex_rows", &complex_rows));
    b->parts = complex_rows ? 2 : 1;
    CHECK(read_pair(kernel, info, "feature_size", &b->height, &b->width));
    const char *problem = lay_out(b, inputs, bands);
    return problem ? failure(kernel, problem) : NULL;
}

size_t bands_workspace(const Bands *b) {
    size_t rows = (size_t)b->parts * b->height;
    size_t plane = (rows * (1 + b->bands) + b->kept_rows) * b->kept_step +
                   (size_t)b->bands * 8 * b->wide_step;
    size_t copied = (size_t)b->channels * b->wide_step, maps = b->weighted * b->wide_step;
    size_t most = plane > copied ? plane : copied;
    return most > maps ? most : maps;
}

STEP(products, BandRun, bands_workspace(run->bands))
STEP(maps, BandRun, bands_workspace(run->bands))
STEP(planes, BandRun, bands_workspace(run->bands))

static OrtStatus *compute(void *op_kernel, OrtKernelContext *context) {
    const Kernel *kernel = op_kernel;
    const Bands *b = &((const BandsKernel *)op_kernel)->bands;
    Tensor x;
    CHECK(read_input(kernel, context, X, &x));
    if (x.rank != 4 || x.type != ORT_FLOAT || x.shape[1] != b->channels ||
        x.shape[2] != b->height || x.shape[3] != b->width)
        return failure(kernel, "its input has another shape than it was made for");
    size_t batch = (size_t)x.shape[0], plane = (size_t)b->height * b->wide_step;
    float *y;
    CHECK(make_output(kernel, context, 0, x.shape, 4, &y));

    size_t products = batch * b->weighted * b->taps * b->taps * plane;
    size_t maps = batch * (b->bands + 1) * plane;
    float *scratch = call_space(products + maps);
    if (!scratch) return failure(kernel, no_memory);
    BandRun run = {b, x.data, y, scratch, scratch + products, 0};
    size_t rows = batch * b->height, planes = batch * b->channels;
    OrtStatus *status = parallel(kernel, context, run_products, rows, &run);
    if (!status) status = parallel(kernel, context, run_maps, rows, &run);
    if (!status) status = parallel(kernel, context, run_planes, planes, &run);
    if (!status && run.failed) status = failure(kernel, no_memory);
    return status;
}

OrtStatus *bands_register(OrtCustomOpDomain *domain, const OrtApi *api) {
    kernels = &best_kernels()->bands;
    for (int i = 0; i < MOST_BANDS; i++) {
        BandsOp *op = &ops[i];
        op->bands = i + 1;
        op->head = (Op){.least_inputs = FIRST_BAND + 2 * op->bands,
                        .kernel_size = sizeof(BandsKernel), .make = make, .compute = compute,
                        .release = release};
        char count[16] = "";
        if (op->bands != 3) snprintf(count, sizeof count, "_%dBands", op->bands);
        snprintf(op->head.name, sizeof op->head.name, "FrequencyBandModulation%s", count);
        CHECK(add_op(domain, api, &op->head));
    }
    return NULL;
}
