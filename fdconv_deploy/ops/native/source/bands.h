/* One layer's band modulation: its constants, and the three steps of its work.
 *
 * y = w0∘x + Σ w(j+1)∘low_j, low_j = from_rows_j · kept_j · from_columns_j, where kept_j is a
 * leading block of to_rows · (x · to_columns). All of one channel's plane stays in a core's cache.
 *
 * Where rows are complex (`parts` is 2) the projected rows count double: real, then imaginary.
 */
#ifndef FDCONV_BANDS_H
#define FDCONV_BANDS_H

#include <stddef.h>

enum { MOST_BANDS = 8 };

typedef struct {
    int rows, columns; /* of the coefficients it keeps */
    float *from_rows;  /* (parts·H, rows) */
    float *from_columns; /* (parts, columns, wide_step) */
} Band;

/* Rows of matrices are padded with zeros to a multiple of 16 floats: `kept_step`, `wide_step`.
 * conv: (weighted·s·s, I), flipped as a transposed convolution's. */
typedef struct {
    int channels, height, width, parts, bands, weighted, taps;
    int kept_rows, kept_columns;
    size_t kept_step, wide_step;
    float *to_columns; /* (parts, W, kept_step) */
    float *to_rows;    /* (kept_rows, parts·H) */
    float *conv, *conv_bias, *mix, *mix_bias;
    Band band[MOST_BANDS];
} Bands;

/* products: per image (weighted·s·s, H, wide_step); maps: per image (bands + 1, H, wide_step). */
typedef struct {
    const Bands *bands;
    const float *x;
    float *y, *products, *maps;
    int failed;
} BandRun;

size_t bands_workspace(const Bands *bands);

/* Units: a row of an image, twice, then a channel of an image. */
typedef struct {
    void (*products)(const BandRun *run, size_t unit, float *work);
    void (*maps)(const BandRun *run, size_t unit, float *work);
    void (*planes)(const BandRun *run, size_t unit, float *work);
} BandKernels;

#endif
