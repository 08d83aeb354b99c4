/* `fdconv.nchwc::FrequencyBandModulation` as a custom operator of ONNX Runtime: the inputs and
 * attributes of `fdconv::FrequencyBandModulation*` in every form, and `block`; features in blocks
 * of so many channels. `channels_last`, which may be missing: (N, H, W, C), of whole blocks, which
 * graphs in other layouts are modulated in, too (fdconv_deploy/runtime/native_layers.py).
 */
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "kernels.h"
#include "op.h"

enum { X, CONV, CONV_BIAS, MIX, MIX_BIAS, TO_COLUMNS, TO_ROWS, FIRST_BAND };

typedef struct {
    Kernel head;
    BlockedBands bands;
} BandsKernel;

static Op op;

static void release(Kernel *kernel) {
    BlockedBands *b = &((BandsKernel *)kernel)->bands;
    axis_free(&b->rows);
    axis_free(&b->columns);
    for (int j = 0; j < b->bands; j++) {
        axis_band_free(&b->band[j].rows);
        axis_band_free(&b->band[j].columns);
    }
    free(b->piece_slot);
    free(b->piece_segment);
    free(b->conv_at);
    free(b->conv);
    free(b->conv_bias);
    free(b->mix);
    free(b->mix_bias);
}

static float *copy(const Tensor *from) {
    size_t bytes = elements(from, ORT_FLOAT) * sizeof(float);
    float *to = aligned(bytes);
    return to ? memcpy(to, from->data, bytes) : NULL;
}

/* The logits' convolution, as a convolution. */
static const char *lay_out_conv(BlockedBands *b, const float *conv) {
    int size = b->channels / b->groups, block = b->block, taps = b->taps;
    size_t step = (size_t)taps * taps * b->weighted * block, total = 0;
    b->conv_at = malloc(b->groups * sizeof *b->conv_at);
    if (!b->conv_at) return no_memory;
    for (int g = 0; g < b->groups; g++) {
        b->conv_at[g] = total;
        total += (((g + 1) * size - 1) / block - g * size / block + 1) * step;
    }
    b->conv = aligned(total * sizeof(float));
    if (!b->conv) return no_memory;
    memset(b->conv, 0, total * sizeof(float));
    for (int c = 0; c < b->channels; c++) {
        int g = c / size;
        float *to = b->conv + b->conv_at[g] + (c / block - g * size / block) * step + c % block;
        for (int m = 0; m < b->weighted; m++)
            for (int tap = 0; tap < taps * taps; tap++)
                to[((taps * taps - 1 - tap) * b->weighted + m) * block] =
                    conv[(c * b->weighted + m) * taps * taps + tap];
        if ((c / block * block) / size != (c / block * block + block - 1) / size) b->lane_maps = 1;
    }
    return NULL;
}

static const char *lay_out_pieces(BlockedBands *b) {
    const int *first = b->columns.first;
    b->slots = b->columns.vectors / b->parts;
    b->segments = CLASSES / b->parts;
    b->piece_slot = malloc((b->slots + 1) * sizeof *b->piece_slot);
    b->piece_segment = malloc((b->slots + 1) * sizeof *b->piece_segment);
    if (!b->piece_slot || !b->piece_segment) return no_memory;
    for (int segment = 0; segment < b->segments; segment++) {
        int slot = first[segment * b->parts] / b->parts;
        int end = first[(segment + 1) * b->parts] / b->parts;
        for (; slot < end; slot += SLOTS_AT_ONCE) {
            b->piece_slot[b->pieces] = slot;
            b->piece_segment[b->pieces++] = segment;
        }
    }
    b->piece_slot[b->pieces] = b->slots;
    b->row_step = (size_t)(b->height | 1) * b->block;
    b->slot_step = (size_t)(b->slots | 1) * b->block;
    return NULL;
}

static const char *lay_out_band(BlockedBands *b, int j, const Tensor *from_rows,
                                const Tensor *from_columns, int kept_columns, int *place) {
    BlockedBand *band = &b->band[j];
    int rows = (int)from_rows->shape[1], columns = (int)from_columns->shape[0] / b->parts;
    int all_rows = b->rows.vectors, length = b->height * b->parts;
    if (from_rows->shape[0] != length || from_columns->shape[1] != b->width ||
        from_columns->shape[0] != (int64_t)b->parts * columns || columns > kept_columns ||
        rows > all_rows)
        return unknown;
    float *turned = malloc((size_t)rows * length * sizeof(float));
    if (!turned) return no_memory;
    for (int v = 0; v < rows; v++)
        for (int n = 0; n < length; n++)
            turned[(size_t)v * length + n] =
                ((const float *)from_rows->data)[(size_t)n * rows + v];
    for (int v = 0; v < all_rows; v++) place[v] = v < rows ? v : -1;
    const char *problem = axis_band_make(&band->rows, &b->rows, turned, place);
    free(turned);
    if (problem) return problem;
    for (int part = 0; part < b->parts; part++)
        for (int v = 0; v < kept_columns; v++)
            place[part * kept_columns + v] = v < columns ? part * columns + v : -1;
    return axis_band_make(&band->columns, &b->columns, from_columns->data, place);
}

static const char *lay_out(BlockedBands *b, const Tensor *in) {
    for (int i = CONV; i < FIRST_BAND + 2 * b->bands; i++) {
        int rank = i == CONV ? 4 : i == CONV_BIAS ? 1 : 2;
        if (!in[i].data || in[i].rank != rank || !elements(&in[i], ORT_FLOAT)) return unknown;
    }
    b->channels = (int)in[CONV].shape[0];
    b->weighted = (int)in[CONV].shape[1];
    b->taps = (int)in[CONV].shape[2];
    b->blocks = (b->channels + b->block - 1) / b->block;
    b->pixel = b->channels_last ? b->channels : b->block;
    b->plane = b->channels_last ? (size_t)b->block : (size_t)b->height * b->width * b->block;
    b->wide_step = ((size_t)b->width + LANES - 1) / LANES * LANES;
    int columns = (int)in[TO_COLUMNS].shape[1], rows = (int)in[TO_ROWS].shape[0];
    if (b->height < 1 || b->width < 1 || b->groups < 1 || b->channels % b->groups ||
        (b->channels_last && b->channels % b->block) || b->taps > MOST_TAPS || b->taps % 2 == 0 || in[CONV].shape[3] != b->taps ||
        in[CONV_BIAS].shape[0] != (int64_t)b->groups * b->weighted ||
        in[MIX].shape[0] != b->bands + 1 || in[MIX].shape[1] != b->weighted ||
        elements(&in[MIX_BIAS], ORT_FLOAT) != (size_t)b->bands + 1 ||
        in[TO_COLUMNS].shape[0] != b->width || columns % b->parts ||
        in[TO_ROWS].shape[1] != (int64_t)b->parts * b->height)
        return unknown;
    b->conv_bias = copy(&in[CONV_BIAS]);
    b->mix = copy(&in[MIX]);
    b->mix_bias = copy(&in[MIX_BIAS]);
    int most = rows > columns ? rows : columns;
    int *place = malloc(most * sizeof *place);
    float *turned = malloc((size_t)columns * b->width * sizeof(float));
    const char *problem = NULL;
    if (!b->conv_bias || !b->mix || !b->mix_bias || !place || !turned)
        problem = no_memory;
    else
        problem = lay_out_conv(b, in[CONV].data);
    if (!problem) {
        for (int w = 0; w < b->width; w++)
            for (int v = 0; v < columns; v++)
                turned[(size_t)v * b->width + w] =
                    ((const float *)in[TO_COLUMNS].data)[(size_t)w * columns + v];
        problem = axis_make(&b->columns, b->width, 1, turned, columns, b->parts == 2);
    }
    if (!problem) problem = axis_make(&b->rows, b->height, b->parts, in[TO_ROWS].data, rows, 0);
    if (!problem && b->rows.vectors != rows) problem = unknown; /* a row of zeros */
    if (!problem) problem = lay_out_pieces(b);
    for (int j = 0; j < b->bands && !problem; j++) {
        const Tensor *from_rows = &in[FIRST_BAND + 2 * j];
        problem = lay_out_band(b, j, from_rows, from_rows + 1, columns / b->parts, place);
    }
    free(place);
    free(turned);
    return problem;
}

static OrtStatus *make(Kernel *kernel, const OrtKernelInfo *info) {
    const OrtApi *api = kernel->api;
    Tensor inputs[FIRST_BAND + 2 * MOST_BANDS];
    size_t count;
    BlockedBands *b = &((BandsKernel *)kernel)->bands;
    int complex_rows;
    CHECK(read_int(kernel, info, "block", &b->block));
    CHECK(read_int(kernel, info, "groups", &b->groups));
    CHECK(read_int(kernel, info, "softmax", &b->softmax));
    CHECK(read_int(kernel, info, "complex_rows", &complex_rows));
    CHECK(api->KernelInfo_GetInputCount(info, &count));
    if (count < FIRST_BAND + 2 || count > FIRST_BAND + 2 * MOST_BANDS ||
        (count - FIRST_BAND) % 2 || (b->block != 8 && b->block != 16))
        return failure(kernel, unknown);
    for (size_t i = 0; i < count; i++) CHECK(read_constant(kernel, info, i, &inputs[i]));
    b->parts = complex_rows ? 2 : 1;
    CHECK(read_pair(kernel, info, "feature_size", &b->height, &b->width));
    b->channels_last = read_flag(kernel, info, "channels_last");
    b->bands = (int)(count - FIRST_BAND) / 2;
    const char *problem = lay_out(b, inputs);
    return problem ? failure(kernel, problem) : NULL;
}

size_t projected_size(const BlockedBands *b) {
    return (b->columns.vectors * b->row_step + LANES - 1) / LANES * LANES;
}

size_t coefficients_size(const BlockedBands *b) {
    return (b->rows.vectors * b->slot_step + LANES - 1) / LANES * LANES;
}

size_t blocked_bands_workspace(const BlockedBands *b) {
    enum { TALLEST = 8 };
    size_t row_places = (size_t)b->rows.orbits * b->parts * SLOTS_AT_ONCE;
    size_t folded = (size_t)b->columns.orbits * ROWS_AT_ONCE;
    if (folded < row_places) folded = row_places;
    folded *= CLASSES * b->block;
    size_t weighing = (size_t)b->bands * CLASSES * TALLEST * 2 * LANES, longest = 0;
    if (b->lane_maps) weighing += (size_t)(b->bands + 1) * b->width * b->block * 2;
    for (int j = 0; j < b->bands; j++) {
        const AxisBand *columns = &b->band[j].columns;
        weighing += (size_t)columns->first[CLASSES] * (ROW_GROUP + 1) * b->block;
        for (int c = 0; c < CLASSES; c++)
            if (longest < (size_t)columns->count[c]) longest = columns->count[c];
    }
    weighing += CLASSES * ORBITS_AT_ONCE * b->parts * longest * b->block;
    return folded > weighing ? folded : weighing;
}

static size_t maps_workspace(const BlockedBands *b) {
    return (size_t)b->groups * b->weighted * b->wide_step * MAP_ROWS_AT_ONCE;
}

#define kernels run->kernels
STEP(maps, BlockedBandRun, maps_workspace(run->bands))
STEP(blocks, BlockedBandRun, projected_size(run->bands) + coefficients_size(run->bands) +
                                 blocked_bands_workspace(run->bands))
STEP(project, BlockedBandRun, blocked_bands_workspace(run->bands))
STEP(transform, BlockedBandRun, blocked_bands_workspace(run->bands))
STEP(weigh, BlockedBandRun, blocked_bands_workspace(run->bands))
#undef kernels

/* Every step over all blocks, where there are too few of them for the processors. */
static OrtStatus *by_steps(const Kernel *kernel, OrtKernelContext *context, size_t blocks,
                           BlockedBandRun *run) {
    const BlockedBands *b = run->bands;
    size_t rows = ((size_t)b->height + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE;
    size_t groups = ((size_t)b->rows.orbits + ORBITS_AT_ONCE - 1) / ORBITS_AT_ONCE;
    OrtStatus *status = parallel(kernel, context, run_project, blocks * rows, run);
    if (!status) status = parallel(kernel, context, run_transform, blocks * b->pieces, run);
    if (!status) status = parallel(kernel, context, run_weigh, blocks * groups, run);
    return status;
}

static OrtStatus *compute(void *op_kernel, OrtKernelContext *context) {
    const Kernel *kernel = op_kernel;
    const BlockedBands *b = &((const BandsKernel *)op_kernel)->bands;
    Tensor x;
    CHECK(read_input(kernel, context, X, &x));
    int channels = b->channels_last ? 3 : 1, height = b->channels_last ? 1 : 2;
    if (x.rank != 4 || !elements(&x, ORT_FLOAT) ||
        x.shape[channels] != (int64_t)b->blocks * b->block || x.shape[height] != b->height ||
        x.shape[height + 1] != b->width)
        return failure(kernel, "its input has another shape than it was made for");
    BlockedBandRun run = {.bands = b, .kernels = &kernels_for_block(b->block)->blocked_bands,
                          .x = x.data};
    CHECK(make_output(kernel, context, 0, x.shape, 4, &run.y));
    size_t images = (size_t)x.shape[0], blocks = images * b->blocks;
    size_t maps = images * b->groups * (b->bands + 1) * b->height * b->wide_step;
    int by_blocks = (long)blocks >= sysconf(_SC_NPROCESSORS_ONLN);
    size_t projected = by_blocks ? 0 : blocks * projected_size(b);
    size_t coefficients = by_blocks ? 0 : blocks * coefficients_size(b);
    run.maps = call_space(maps + projected + coefficients);
    if (!run.maps) return failure(kernel, no_memory);
    run.projected = run.maps + maps;
    run.coefficients = run.projected + projected;
    size_t row_units = ((size_t)b->height + MAP_ROWS_AT_ONCE - 1) / MAP_ROWS_AT_ONCE;
    OrtStatus *status = parallel(kernel, context, run_maps, images * row_units, &run);
    if (!status)
        status = by_blocks ? parallel(kernel, context, run_blocks, blocks, &run)
                           : by_steps(kernel, context, blocks, &run);
    if (!status && run.failed) status = failure(kernel, no_memory);
    return status;
}

OrtStatus *blocked_bands_register(OrtCustomOpDomain *domain, const OrtApi *api) {
    op = (Op){.least_inputs = FIRST_BAND + 2, .kernel_size = sizeof(BandsKernel), .make = make,
              .compute = compute, .release = release, .name = "FrequencyBandModulation"};
    return add_op(domain, api, &op);
}
