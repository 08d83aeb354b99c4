/* One layer's band modulation on features in blocks of channels, which lie in a vector's lanes:
 * its constants, and the steps of its work.
 *
 * y = w0∘x + Σ w(j+1)∘low_j, low_j = from_rows_j · kept_j · from_columns_j, where kept_j is a
 * leading block of to_rows · (x · to_columns). Every product is of a small constant matrix and
 * vectors of channels, so that each of the matrix's numbers is broadcast; by the axes' symmetries
 * it is four products of a quarter of the length (axis.h).
 *
 * Where rows are complex (`parts` is 2) the projected rows count double: real, then imaginary.
 */
#ifndef FDCONV_BLOCKED_BANDS_H
#define FDCONV_BLOCKED_BANDS_H

#include "axis.h"

enum { MOST_BANDS = 8, MAP_ROWS_AT_ONCE = 4, ROWS_AT_ONCE = 2, SLOTS_AT_ONCE = 2,
       ROW_GROUP = ORBITS_AT_ONCE * MEMBERS,
       MOST_TAPS = 15 };

typedef struct {
    AxisBand rows, columns;
} BlockedBand;

/* A slot is what the rows' transform takes at once: a vector along the columns, or where rows are
 * complex a real and an imaginary one. Slots come in segments of one class, `pieces` of at most
 * SLOTS_AT_ONCE in each.
 *
 * pixel, plane: floats between neighbouring pixels and blocks; blocks may also lie side by side,
 * channels last. conv: for each group of channels, for the blocks that it has a part in, (taps, taps, weighted,
 * block), zeros outside of the group; from conv_at[group] on. lane_maps: some block has channels
 * of several groups. */
typedef struct {
    int channels, height, width, block, blocks, parts, bands, weighted, taps, groups, softmax;
    int slots, segments, pieces, lane_maps, channels_last;
    size_t pixel, plane, row_step, slot_step, wide_step;
    Axis rows, columns;
    BlockedBand band[MOST_BANDS];
    int *piece_slot, *piece_segment;
    size_t *conv_at;
    float *conv, *conv_bias, *mix, *mix_bias;
} BlockedBands;

typedef struct BlockedBandKernels BlockedBandKernels;

/* maps: (images, groups, bands + 1, H, wide_step). projected: per block (column vectors, row_step),
 * coefficients: (row vectors, slot_step), of all blocks, or NULL where each is a thread's own. */
typedef struct {
    const BlockedBands *bands;
    const BlockedBandKernels *kernels;
    const float *x;
    float *y, *maps, *projected, *coefficients;
    int failed;
} BlockedBandRun;

size_t projected_size(const BlockedBands *bands);
size_t coefficients_size(const BlockedBands *bands);
size_t blocked_bands_workspace(const BlockedBands *bands);

/* Units: MAP_ROWS_AT_ONCE rows of an image; a block of an image; then, of each block of an image, ROWS_AT_ONCE
 * rows, a piece, ORBITS_AT_ONCE orbits of rows. */
struct BlockedBandKernels {
    void (*maps)(const BlockedBandRun *run, size_t unit, float *work);
    void (*blocks)(const BlockedBandRun *run, size_t unit, float *work);
    void (*project)(const BlockedBandRun *run, size_t unit, float *work);
    void (*transform)(const BlockedBandRun *run, size_t unit, float *work);
    void (*weigh)(const BlockedBandRun *run, size_t unit, float *work);
};

#endif
