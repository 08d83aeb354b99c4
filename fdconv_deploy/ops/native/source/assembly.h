/* One layer's assembly: its constants, and the two halves of its work.
 *
 * A kernel matrix has R = O·kh rows and C = I·kw columns. The spectrum is inverted as the
 * published code does: rows first, as complex numbers, half of the columns; then the columns
 * onto real numbers. 16 independent transforms run side by side, in the lanes of vectors, so no
 * transform ever shuffles. A complex vector is 16 real parts and 16 imaginary parts, 32 floats.
 */
#ifndef FDCONV_ASSEMBLY_H
#define FDCONV_ASSEMBLY_H

#include <stddef.h>
#include <stdint.h>

enum { LANES = 16, PAIR = 2 * LANES, MOST_PASSES = 16, MOST_LOCAL = 16 };

/* One pass of an inverse transform (Stockham's, which leaves results in order).
 *
 * `count` butterflies of `radix` inputs are spread over `stride` places each. turns: for each
 * butterfly, radix - 1 complex twiddles. roots: radix complex roots, for radices without a
 * butterfly of their own. */
typedef struct {
    int radix, count, stride;
    const float *turns, *roots;
} Pass;

/* The inverse transform of one length, without the 1/length. */
typedef struct {
    int length, passes;
    Pass pass[MOST_PASSES];
    float *table;
} Transform;

/* 0, or -1 without memory. */
int transform_make(Transform *transform, int length);
void transform_free(Transform *transform);

/* values: (tiles, planes, R, 2, 16) floats, attention still missing, groups, or few_groups where
 * a byte holds each: (tiles, planes, R, 16): columns below C/2, 16 to a tile, zeros past the end. Of an even C column C/2, the Nyquist
 * column, is by itself: (planes, R, 2) and (planes, R), zeros of an odd C. local: (ceil(O/16), kh,
 * kw, taps, 16). block: 0, or kernels are written as ONNX Runtime's blocked convolution reads
 * them, (O/b, I/b, kh, kw, b, b), zeros past the end, and scaled by the gates that lie in the
 * attention matrix at filter_at, spatial_at and channel_at (-1: none), and by row_scale. */
typedef struct {
    int out_channels, in_channels, kernel_height, kernel_width;
    int rows, columns, planes, attentions;
    int row_tiles, column_tiles;
    int by_rows, taps, local_at, column_scale_at, row_scale_at;
    int block, filter_at, spatial_at, channel_at;
    Transform row_transform, column_transform;
    float *values, *nyquist, *local;
    uint16_t *groups, *nyquist_groups;
    uint8_t *few_groups;
} Assembly;

/* One run's inputs and output. half: per image (row_tiles, kh, 16·column_tiles, 2, 16), may be
 * the output itself where that has the size. scale_rows: kh where the column scale differs by
 * kernel row, else 1. row_scale_step: 0 where all images share one. */
typedef struct {
    const Assembly *assembly;
    const struct AssemblyKernels *kernels;
    int batch, attentions, scale_rows, row_scale_step;
    const float *attention, *average, *column_scale, *row_scale;
    float *half, *output;
    size_t half_step;
    int failed;
} AssemblyRun;

/* Work of one call, in floats, of a thread's own. */
size_t rows_workspace(const Assembly *assembly);
size_t columns_workspace(const Assembly *assembly);

/* `unit` is a tile of columns, then (image, pair of row tiles). */
typedef struct AssemblyKernels {
    void (*rows)(const AssemblyRun *run, size_t unit, float *work);
    void (*columns)(const AssemblyRun *run, size_t unit, float *work);
} AssemblyKernels;

#endif
