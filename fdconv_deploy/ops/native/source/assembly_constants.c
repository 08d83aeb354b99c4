/* From the portable graph's constants to `Assembly`.
 *
 * The graph stores one row of each two that mirror one another, all columns, in the order of its
 * transform's digits (fdconv_deploy/folding/spectrum.py). Each bin's contribution is the real
 * part of a turned value, so a bin may as well be stored as its conjugate at the mirrored place:
 * that brings all bins into columns 0 ... C/2. In columns 0 and, of an even C, C/2 a row may have
 * two slots, its own and its mirror image's, weighed by different attentions: the image goes back
 * to its own row.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "node.h"

enum { UNSET = 0xffff, MOST_LENGTH = 1 << 24 };

typedef struct {
    int factors[MOST_PASSES], count, length;
} Digits;

/* frequency of each place of the axes `first` ..., last varying fastest; factor j weighs the
 * product of those before it. */
static int *digit_order(const Digits *digits, int first) {
    int weight = 1, size = 1;
    for (int j = 0; j < first; j++) weight *= digits->factors[j];
    int *order = calloc((size_t)digits->length, sizeof(int));
    if (!order) return NULL;
    for (int j = first; j < digits->count; j++) {
        int factor = digits->factors[j];
        for (int place = size - 1; place >= 0; place--)
            for (int digit = factor - 1; digit >= 0; digit--)
                order[place * factor + digit] = order[place] + weight * digit;
        size *= factor;
        weight *= factor;
    }
    return order;
}

/* Factors from the stages' shapes, which go from the last factor to `until`. */
static int read_factors(Digits *digits, const Tensor *stages, int count, int outer) {
    digits->count = count + (outer > 0);
    digits->length = outer > 0 ? outer : 1;
    if (outer > 0) digits->factors[0] = outer;
    for (int i = 0; i < count; i++) {
        const Tensor *stage = &stages[i];
        if (stage->rank < 2 || stage->shape[stage->rank - 1] % 2) return -1;
        int factor = (int)(stage->shape[stage->rank - 1] / 2);
        if (factor > MOST_LENGTH / digits->length) return -1;
        digits->factors[digits->count - 1 - i] = factor;
        digits->length *= factor;
    }
    return 0;
}

/* The row frequency of each slot, `classes` times the further digits. */
static int *slot_rows(const Digits *digits, const Tensor *outer, int slots) {
    int first = digits->factors[0], classes = (int)(outer->shape[1] / 2);
    int higher = digits->length / first;
    const float *matrix = outer->data;
    int *rows = malloc((size_t)slots * sizeof(int));
    int *order = digit_order(digits, 1);
    int told = classes <= first / 2 + 1 || outer->shape[0] > 1;
    if (rows && order && told && (size_t)classes * higher == (size_t)slots)
        for (int class = 0; class < classes; class++) {
            /* Classes after the first few are second slots; position 1's phase tells whose. */
            int residue = class;
            if (class > first / 2) {
                const float *phase = matrix + outer->shape[1] + 2 * class;
                double turns = atan2(-phase[1], phase[0]) / 6.283185307179586477;
                residue = turns == turns ? ((int)lround(turns * first) + first) % first : 0;
            }
            for (int k = 0; k < higher; k++) rows[class * higher + k] = residue + order[k];
        }
    else {
        free(rows);
        rows = NULL;
    }
    free(order);
    return rows;
}

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

static const char *fill(Assembly *a, const Node *node, const int *rows, const int *columns,
                        int slots, int last) {
    const float *spectrum = node->inputs[1].data;
    const Tensor *patterns = &node->inputs[2];
    const int32_t *blocks = node->inputs[3].data;
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
                    if (group < 0 || group >= UNSET) return unknown;
                    if (group >= a->attentions) a->attentions = group + 1;
                    place(&placing, plane, rows[slot], columns[lead * last + digit], value[0],
                          value[image], group);
                }
        }
    if (placing.failed) return unknown;
    size_t bins = (size_t)a->column_tiles * a->planes * a->rows * LANES;
    for (size_t i = 0; i < bins; i++)
        if (a->groups[i] == UNSET) a->groups[i] = 0;
    for (size_t i = 0; i < (size_t)a->planes * a->rows; i++)
        if (a->nyquist_groups[i] == UNSET) a->nyquist_groups[i] = 0;
    return NULL;
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

static const char *make(Assembly *a, const Node *node, int **rows, int **columns) {
    const Form *form = node->form;
    const Tensor *inputs = node->inputs, *column_stages = inputs + 4;
    const Tensor *row_stages = column_stages + form->column_stages;
    const Tensor *outer = row_stages + form->row_stages - 1;
    const Tensor *after = outer + 1;
    size_t constants = (size_t)(outer - inputs) + 1;
    for (size_t i = 1; i < constants; i++)
        if (!inputs[i].data) return "a constant input of it is not constant";
    for (size_t i = 4; i < constants; i++)
        if (!elements(&inputs[i], ORT_FLOAT)) return unknown;
    const Tensor *spectrum = &inputs[1];
    if (spectrum->rank != (form->planes ? 4 : 3) || outer->rank != 2 ||
        !elements(spectrum, ORT_FLOAT))
        return unknown;

    Digits column_digits, row_digits;
    if (read_factors(&column_digits, column_stages, form->column_stages, 0) ||
        read_factors(&row_digits, row_stages, form->row_stages - 1, (int)outer->shape[0]))
        return unknown;
    a->rows = row_digits.length;
    a->columns = column_digits.length;
    a->planes = form->planes ? (int)spectrum->shape[0] : 1;
    a->by_rows = form->by_rows;
    int last = column_digits.factors[column_digits.count - 1];
    int slots = (int)(spectrum->shape[spectrum->rank - 1] / last);
    size_t bins_told = (size_t)a->planes * a->columns * slots;
    if (elements(spectrum, ORT_FLOAT) != 2 * bins_told ||
        !covered(&inputs[2], &inputs[3], bins_told))
        return unknown;

    const int64_t *shape = node->kernel_shape;
    a->kernel_height = (int)shape[2];
    a->kernel_width = form->by_rows ? (node->kernel_width ? node->kernel_width : 1) : (int)shape[3];
    if (a->kernel_height < 1 || a->kernel_width < 1) return unknown;
    a->in_channels = a->columns / a->kernel_width;
    a->out_channels = a->rows / a->kernel_height;
    if (a->in_channels * a->kernel_width != a->columns ||
        a->out_channels * a->kernel_height != a->rows)
        return unknown;
    a->row_tiles = (a->out_channels + LANES - 1) / LANES;
    a->column_tiles = ((a->columns + 1) / 2 + LANES - 1) / LANES;

    int at = (int)constants;
    a->local_at = a->column_scale_at = a->row_scale_at = -1;
    if (form->local) {
        const Tensor *weight = &after[2];
        a->local_at = at;
        at += 3;
        if (!weight->data || weight->rank != 2 || !elements(weight, ORT_FLOAT) ||
            weight->shape[0] != a->rows ||
            weight->shape[1] % a->kernel_width)
            return unknown;
        a->taps = (int)(weight->shape[1] / a->kernel_width);
        size_t floats = (size_t)a->row_tiles * LANES * a->kernel_height * weight->shape[1];
        a->local = aligned(floats * sizeof(float));
        if (!a->local) return no_memory;
        fill_local(a, weight->data);
    }
    if (form->column_scale) a->column_scale_at = at++;
    if (form->row_scale) a->row_scale_at = at++;
    if ((size_t)at != node->count) return "it has another number of inputs than its name says";

    size_t bins = (size_t)a->column_tiles * a->planes * a->rows * LANES;
    size_t outside = (size_t)a->planes * a->rows;
    a->values = aligned(2 * bins * sizeof(float));
    a->groups = aligned(bins * sizeof(uint16_t));
    a->nyquist = calloc(2 * outside, sizeof(float));
    a->nyquist_groups = malloc(outside * sizeof(uint16_t));
    *columns = digit_order(&column_digits, 0);
    if (!a->values || !a->groups || !a->nyquist || !a->nyquist_groups || !*columns) return no_memory;
    if (transform_make(&a->row_transform, a->rows) ||
        transform_make(&a->column_transform, a->columns))
        return no_memory;
    *rows = slot_rows(&row_digits, outer, slots);
    if (!*rows) return unknown;
    memset(a->values, 0, 2 * bins * sizeof(float));
    memset(a->groups, 0xff, bins * sizeof(uint16_t));
    memset(a->nyquist_groups, 0xff, outside * sizeof(uint16_t));
    return fill(a, node, *rows, *columns, slots, last);
}

const char *assembly_make(Assembly *assembly, const Node *node) {
    int *rows = NULL, *columns = NULL;
    memset(assembly, 0, sizeof *assembly);
    const char *problem = make(assembly, node, &rows, &columns);
    free(rows);
    free(columns);
    if (problem) assembly_free(assembly);
    return problem;
}

void assembly_free(Assembly *assembly) {
    transform_free(&assembly->row_transform);
    transform_free(&assembly->column_transform);
    free(assembly->values);
    free(assembly->nyquist);
    free(assembly->local);
    free(assembly->groups);
    free(assembly->nyquist_groups);
    memset(assembly, 0, sizeof *assembly);
}

size_t rows_workspace(const Assembly *a) { return (size_t)a->rows * (2 * PAIR + 2) + LANES; }

size_t columns_workspace(const Assembly *a) {
    size_t pointers = (size_t)a->kernel_height * sizeof(float *) / sizeof(float);
    return ((size_t)a->kernel_height + 1) * a->columns * PAIR + a->in_channels + a->taps +
           pointers + 4 * LANES;
}
