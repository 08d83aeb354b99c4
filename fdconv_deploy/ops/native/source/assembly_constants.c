/* From the portable graph's constants to `Assembly`.
 *
 * The graph stores one row of each two that mirror one another, all columns, in the order of its
 * transform's digits (fdconv_deploy/folding/spectrum.py). Each bin's contribution is the real
 * part of a turned value, so a bin may as well be stored as its conjugate at the mirrored place:
 * that brings all bins into columns 0 ... C/2. In columns 0 and, of an even C, C/2 a row may have
 * two slots, its own and its mirror image's, weighed by different attentions: the image goes back
 * to its own row.
 */
#include <stdlib.h>
#include <string.h>

#include "node.h"

enum { UNSET = 0xffff };

typedef struct {
    Assembly *to;
    int failed;
} Placing;

static void place(Placing *placing, int plane, int row, int column, float re, float im,
                  int group) {
    Assembly *a = placing->to;
    int middle = a->columns / 2, nyquist = a->columns % 2 ? -1 : middle;
    for (int attempt = 0; attempt < 2; attempt++) {
        if (column > middle || attempt) {
            row = (a->rows - row) % a->rows;
            column = (a->columns - column) % a->columns;
            im = -im;
        }
        uint16_t *owner;
        float *value;
        int apart;
        if (column == nyquist) {
            size_t at = (size_t)plane * a->rows + row;
            owner = a->nyquist_groups + at;
            value = a->nyquist + 2 * at;
            apart = 1;
        } else {
            size_t tile = column / LANES, lane = column % LANES;
            size_t at = (tile * a->planes + plane) * a->rows + row;
            owner = a->groups + at * LANES + lane;
            value = a->values + at * PAIR + lane;
            apart = LANES;
        }
        if (*owner == UNSET || *owner == group) {
            /* Inside, the second half joins each column with its mirror image: twice. */
            float share = column == 0 || column == nyquist ? 1.0f : 0.5f;
            *owner = (uint16_t)group;
            value[0] += re * share;
            value[apart] += im * share;
            return;
        }
        if (column != 0 && column != nyquist) break;
    }
    placing->failed = 1;
}

/* Whether a pattern stands for every bin. */
static int covered(const Tensor *patterns, const Tensor *blocks, size_t bins) {
    if (patterns->rank != 2 ||
        !(elements(patterns, ORT_UINT8) || elements(patterns, ORT_INT32)))
        return 0;
    size_t count = elements(blocks, ORT_INT32), length = (size_t)patterns->shape[1];
    if (count * length < bins) return 0;
    for (size_t i = 0; i < count; i++) {
        int32_t block = ((const int32_t *)blocks->data)[i];
        if (block < 0 || block >= patterns->shape[0]) return 0;
    }
    return 1;
}

static int group_at(const Tensor *patterns, const int32_t *blocks, size_t bin) {
    size_t length = (size_t)patterns->shape[1];
    size_t at = (size_t)blocks[bin / length] * length + bin % length;
    return patterns->type == ORT_UINT8 ? ((const uint8_t *)patterns->data)[at]
                                       : ((const int32_t *)patterns->data)[at];
}

/* `last` columns and all row slots lie side by side. */
static const char *fill(Assembly *a, const Node *node, int last) {
    const int *rows = node->row_frequencies, *columns = node->column_frequencies;
    int slots = (int)node->slots;
    const float *spectrum = node->constants[0].data;
    const Tensor *patterns = &node->constants[1];
    const int32_t *blocks = node->constants[2].data;
    Placing placing = {a, 0};
    size_t bin = 0;
    for (int plane = 0; plane < a->planes; plane++)
        for (int lead = 0; lead < a->columns / last; lead++) {
            size_t image = (size_t)last * slots;
            for (int digit = 0; digit < last; digit++)
                for (int slot = 0; slot < slots; slot++, bin++) {
                    const float *value = spectrum + (bin / image) * 2 * image + bin % image;
                    if (value[0] == 0 && value[image] == 0) continue; /* no bin, or none kept */
                    int group = group_at(patterns, blocks, bin);
                    if (group < 0 || group >= UNSET || rows[slot] < 0) return unknown;
                    if (group >= a->attentions) a->attentions = group + 1;
                    place(&placing, plane, rows[slot], columns[lead * last + digit], value[0],
                          value[image], group);
                }
        }
    if (placing.failed) return unknown;
    size_t bins = (size_t)a->column_tiles * a->planes * a->rows * LANES;
    a->values = share(a->values, 2 * bins * sizeof(float));
    if (!a->values) return no_memory;
    for (size_t i = 0; i < bins; i++)
        if (a->groups[i] == UNSET) a->groups[i] = 0;
    for (size_t i = 0; i < (size_t)a->planes * a->rows; i++)
        if (a->nyquist_groups[i] == UNSET) a->nyquist_groups[i] = 0;
    if (a->attentions > 256) {
        a->groups = share(a->groups, bins * sizeof *a->groups);
        return a->groups ? NULL : no_memory;
    }
    uint8_t *few = aligned(bins);
    if (few)
        for (size_t i = 0; i < bins; i++) few[i] = (uint8_t)a->groups[i];
    free(a->groups);
    a->groups = NULL;
    a->few_groups = few ? share(few, bins) : NULL;
    return a->few_groups ? NULL : no_memory;
}

/* The graph's taps come first and its kernel columns, reversed, second: (R, taps·kw). */
static void fill_local(Assembly *a, const float *weight) {
    int high = a->kernel_height, wide = a->kernel_width, taps = a->taps;
    float *to = a->local;
    for (int tile = 0; tile < a->row_tiles; tile++)
        for (int u = 0; u < high; u++)
            for (int v = 0; v < wide; v++)
                for (int t = 0; t < taps; t++)
                    for (int lane = 0; lane < LANES; lane++) {
                        int o = tile * LANES + lane;
                        size_t at = ((size_t)o * high + u) * taps * wide + t * wide + wide - 1 - v;
                        *to++ = o < a->out_channels ? weight[at] : 0;
                    }
}

static int within(const int *numbers, size_t count, int least, int end) {
    for (size_t i = 0; i < count; i++)
        if (numbers[i] < least || numbers[i] >= end) return 0;
    return 1;
}

static const char *make(Assembly *a, const Node *node) {
    const Form *form = node->form;
    const Tensor *spectrum = &node->constants[0];
    /* After the spectrum and its groups come the matrices of the portable transform, unread. */
    int at = (node->lent < 0 ? 1 + LENT : 1) + form->column_stages + form->row_stages;
    int has_local = form->blocked ? node->taps > 0 : form->local;
    int weight_at = form->blocked ? 1 : 2; /* behind the average */
    a->local_at = a->column_scale_at = a->row_scale_at = -1;
    if (has_local) {
        a->local_at = at;
        at += weight_at + 1;
    }
    if (form->column_scale) a->column_scale_at = at++;
    if (form->row_scale || node->scaled) a->row_scale_at = at++;
    if ((size_t)at != node->count)
        return "it has another number of inputs than its name and attributes say";
    for (size_t i = 0; i < LENT; i++)
        if (!node->constants[i].data) return "a constant input of it is not constant";

    a->out_channels = node->out_channels;
    a->in_channels = node->in_channels;
    a->kernel_height = node->kernel_height;
    a->kernel_width = node->kernel_width;
    a->by_rows = node->by_rows;
    a->taps = node->taps;
    a->block = node->block;
    a->filter_at = node->filter_at;
    a->spatial_at = node->spatial_at;
    a->channel_at = node->channel_at;
    if (form->blocked && a->block != 8 && a->block != LANES) return "its block is not 8 or 16";
    if (form->blocked && a->taps > MOST_LOCAL) return unknown;
    int64_t rows = (int64_t)a->out_channels * a->kernel_height;
    int64_t columns = (int64_t)a->in_channels * a->kernel_width;
    if (a->kernel_height < 1 || a->kernel_width < 1 || rows < 1 || rows > MOST_LENGTH ||
        columns < 1 || columns > MOST_LENGTH || (size_t)columns != node->places ||
        !within(node->row_frequencies, node->slots, -1, (int)rows) ||
        !within(node->column_frequencies, node->places, 0, (int)columns))
        return unknown;
    a->rows = (int)rows;
    a->columns = (int)columns;
    a->row_tiles = (a->out_channels + LANES - 1) / LANES;
    a->column_tiles = ((a->columns + 1) / 2 + LANES - 1) / LANES;

    int rank = spectrum->rank;
    if ((rank != 3 && rank != 4) || spectrum->shape[rank - 2] != 2) return unknown;
    a->planes = rank == 4 ? (int)spectrum->shape[0] : 1;
    size_t stored = (size_t)a->planes * a->columns * node->slots;
    size_t side = (size_t)spectrum->shape[rank - 1];
    if (elements(spectrum, ORT_FLOAT) != 2 * stored || side % node->slots ||
        !covered(&node->constants[1], &node->constants[2], stored))
        return unknown;

    if (has_local) {
        const Tensor *weight = &node->inputs[a->local_at + weight_at];
        if (!weight->data || weight->rank != 2 || !elements(weight, ORT_FLOAT) || a->taps < 1 ||
            weight->shape[0] != rows || weight->shape[1] != (int64_t)a->taps * a->kernel_width)
            return unknown;
        size_t floats = (size_t)a->row_tiles * LANES * a->kernel_height * weight->shape[1];
        a->local = aligned(floats * sizeof(float));
        if (!a->local) return no_memory;
        fill_local(a, weight->data);
    } else if (a->taps)
        return unknown;

    size_t bins = (size_t)a->column_tiles * a->planes * a->rows * LANES;
    size_t outside = (size_t)a->planes * a->rows;
    a->values = aligned(2 * bins * sizeof(float));
    a->groups = aligned(bins * sizeof(uint16_t));
    a->nyquist = calloc(2 * outside, sizeof(float));
    a->nyquist_groups = malloc(outside * sizeof(uint16_t));
    if (!a->values || !a->groups || !a->nyquist || !a->nyquist_groups) return no_memory;
    if (transform_make(&a->row_transform, a->rows) ||
        transform_make(&a->column_transform, a->columns))
        return no_memory;
    memset(a->values, 0, 2 * bins * sizeof(float));
    memset(a->groups, 0xff, bins * sizeof(uint16_t));
    memset(a->nyquist_groups, 0xff, outside * sizeof(uint16_t));
    return fill(a, node, (int)(side / node->slots));
}

const char *assembly_make(Assembly *assembly, const Node *node) {
    memset(assembly, 0, sizeof *assembly);
    const char *problem = make(assembly, node);
    if (problem) assembly_free(assembly);
    return problem;
}

void assembly_free(Assembly *assembly) {
    transform_free(&assembly->row_transform);
    transform_free(&assembly->column_transform);
    unshare(assembly->values);
    free(assembly->nyquist);
    free(assembly->local);
    unshare(assembly->groups);
    unshare(assembly->few_groups);
    free(assembly->nyquist_groups);
    memset(assembly, 0, sizeof *assembly);
}

size_t rows_workspace(const Assembly *a) { return (size_t)a->rows * (2 * PAIR + 2) + LANES; }

size_t columns_workspace(const Assembly *a) {
    size_t pointers = (size_t)a->kernel_height * sizeof(float *) / sizeof(float);
    int scaled = a->block || (a->kernel_height == 1 && a->columns == a->in_channels);
    size_t scales = scaled ? (size_t)a->kernel_height * a->columns : 0;
    return ((size_t)a->kernel_height + 1) * a->columns * PAIR + a->in_channels + a->taps +
           pointers + scales + 4 * LANES;
}
