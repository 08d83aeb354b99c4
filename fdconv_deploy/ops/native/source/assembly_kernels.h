/* The two halves of an assembly; included once per instruction set. */

/* Transposes a 16 × 16 block of floats. `from` and `to` have rows of so many floats. */
INLINE void transpose_block(const float *from, size_t from_step, float *to, size_t to_step) {
#pragma GCC unroll 1
    for (int row = 0; row < LANES; row += WIDTH)
#pragma GCC unroll 1
        for (int column = 0; column < LANES; column += WIDTH) {
            Vector v[WIDTH];
#pragma GCC unroll 16
            for (int i = 0; i < WIDTH; i++) v[i] = load(from + (row + i) * from_step + column);
            transpose(v);
#pragma GCC unroll 16
            for (int i = 0; i < WIDTH; i++)
                store_anywhere(to + (column + i) * to_step + row, v[i]);
        }
}

/* Spectra weighed by attention, summed over planes: R complex vectors of one column tile.
 *
 * No conditional expression here or below has vectors for its values: GCC 12 turns
 * `flag ? a + b : a` into an addition masked by the flag's one bit, that is of lane 0. */
static void weigh(const Assembly *a, const float *attention, size_t tile, float *to) {
    size_t rows = a->rows;
    for (int plane = 0; plane < a->planes; plane++) {
        const float *values = a->values + (tile * a->planes + plane) * rows * PAIR;
        const uint16_t *groups = a->groups + (tile * a->planes + plane) * rows * LANES;
        for (size_t r = 0; r < rows; r++, values += PAIR, groups += LANES) {
            float weight[LANES] __attribute__((aligned(64)));
            for (int l = 0; l < LANES; l++) weight[l] = attention[groups[l]];
            float *place = to + r * PAIR;
            if (plane == 0) {
                for (int part = 0; part < PAIR; part += LANES) EACH_VECTOR {
                    store(place + part + h, load(values + part + h) * load(weight + h));
                }
            } else {
                for (int part = 0; part < PAIR; part += LANES) EACH_VECTOR {
                    Vector sum = load(place + part + h);
                    store(place + part + h, sum + load(values + part + h) * load(weight + h));
                }
            }
        }
    }
}

/* Columns 0 and C/2 (of an odd C, zeros) count by the real part of their inverse alone, that is by their Hermitian
 * parts: one transform serves both, as real and imaginary part. In lane 0. */
static void join_outer_columns(const Assembly *a, const float *attention, float *data,
                               float *work) {
    size_t rows = a->rows;
    for (size_t r = 0; r < 2 * rows; r++) work[r] = 0;
    for (int plane = 0; plane < a->planes; plane++)
        for (size_t r = 0; r < rows; r++) {
            float weight = attention[a->nyquist_groups[plane * rows + r]];
            work[2 * r] += a->nyquist[2 * (plane * rows + r)] * weight;
            work[2 * r + 1] += a->nyquist[2 * (plane * rows + r) + 1] * weight;
        }
    for (size_t r = 0; r <= rows / 2; r++) {
        size_t m = (rows - r) % rows;
        float *here = data + r * PAIR, *there = data + m * PAIR;
        float re = (here[0] + there[0]) / 2, im = (here[LANES] - there[LANES]) / 2;
        float nyquist_re = (work[2 * r] + work[2 * m]) / 2;
        float nyquist_im = (work[2 * r + 1] - work[2 * m + 1]) / 2;
        here[0] = re - nyquist_im;
        here[LANES] = im + nyquist_re;
        there[0] = re + nyquist_im;
        there[LANES] = nyquist_re - im;
    }
}

/* First half, one tile of columns of every image: weigh, invert the rows, transpose. */
static void rows_unit(const AssemblyRun *run, size_t tile, float *work) {
    const Assembly *a = run->assembly;
    size_t size = (size_t)a->rows * PAIR;
    int high = a->kernel_height;
    size_t frequencies = (size_t)a->column_tiles * LANES;
    float *zeros = work + 2 * size; /* 2·R floats, of which the last vectors stay zero */
    for (int image = 0; image < run->batch; image++) {
        const float *attention = run->attention + (size_t)image * run->attentions;
        weigh(a, attention, tile, work);
        if (tile == 0) join_outer_columns(a, attention, work, zeros);
        const float *result = invert(&a->row_transform, work, work + size);
        float *half = run->half + image * run->half_step + tile * LANES * PAIR;
        float block[LANES * LANES] __attribute__((aligned(64)));
        for (int row_tile = 0; row_tile < a->row_tiles; row_tile++)
            for (int u = 0; u < high; u++) {
                const float *from = result + ((size_t)row_tile * LANES * high + u) * PAIR;
                float *to = half + (size_t)(row_tile * high + u) * frequencies * PAIR;
                int there = a->out_channels - row_tile * LANES;
                for (int part = 0; part < PAIR; part += LANES) {
                    if (there >= LANES) {
                        transpose_block(from + part, (size_t)high * PAIR, to + part, PAIR);
                        continue;
                    }
                    for (int i = 0; i < LANES; i++)
                        for (int l = 0; l < LANES; l++)
                            block[i * LANES + l] =
                                i < there ? from[(size_t)i * high * PAIR + part + l] : 0;
                    transpose_block(block, LANES, to + part, PAIR);
                }
            }
    }
}

/* Columns of two row tiles -> C complex vectors whose inverse has the first tile as its real part
 * and the second as its imaginary part. */
static void join_tiles(const Assembly *a, const float *first, const float *second, float *to) {
    size_t columns = a->columns, stored = (columns + 1) / 2;
    EACH_VECTOR {
        Complex x = load_complex(first + h), y = load_complex(second + h);
        store_complex(to + h, (Complex){x.re, y.re});
        if (columns % 2 == 0) store_complex(to + stored * PAIR + h, (Complex){x.im, y.im});
    }
    for (size_t f = 1; f < stored; f++) EACH_VECTOR {
        Complex x = load_complex(first + f * PAIR + h), y = load_complex(second + f * PAIR + h);
        store_complex(to + f * PAIR + h, (Complex){x.re - y.im, x.im + y.re});
        store_complex(to + (columns - f) * PAIR + h, (Complex){x.re + y.im, y.re - x.im});
    }
}

/* Sixteen consecutive weights of sixteen output channels, or what is left of either. */
static void write_weights(const float *block, int count, float *to, size_t step, int channels) {
    if (count == LANES && channels >= LANES) {
        transpose_block(block, LANES, to, step);
        return;
    }
    int rows = channels < LANES ? channels : LANES;
    for (int l = 0; l < rows; l++)
        for (int j = 0; j < count; j++) to[l * step + j] = block[j * LANES + l];
}

typedef struct {
    const AssemblyRun *run;
    const float *average; /* padded by taps/2 on both sides */
    const float *column_scale, *local;
    float row_scale[LANES] __attribute__((aligned(64)));
} Gates;

/* One weight of sixteen output channels: kernel row u, kernel column v, input channel i. */
INLINE void modulate(const Gates *gates, const float *value, int u, int v, int i, float *to) {
    const Assembly *a = gates->run->assembly;
    int column = i * a->kernel_width + v, taps = a->taps;
    float scale = 1.0f;
    if (gates->column_scale)
        scale = gates->column_scale[(gates->run->scale_rows > 1 ? u * a->columns : 0) + column];
    const float *local = gates->local + (size_t)(u * a->kernel_width + v) * taps * LANES;
    EACH_VECTOR {
        Vector x = load(value + h) * (load(gates->row_scale + h) * scale);
        if (taps) {
            Vector logit = load(local + h) * gates->average[i];
            for (int t = 1; t < taps; t++)
                logit += load(local + t * LANES + h) * gates->average[i + t];
            x *= sigmoid(logit);
        }
        store(to + h, x);
    }
}

/* Second half, two row tiles of one image: invert the columns, modulate, write kernels. */
static void columns_unit(const AssemblyRun *run, size_t unit, float *work) {
    const Assembly *a = run->assembly;
    size_t pairs = (a->row_tiles + 1) / 2, image = unit / pairs;
    int first = 2 * (int)(unit % pairs), tiles = a->row_tiles - first < 2 ? 1 : 2;
    int high = a->kernel_height, wide = a->kernel_width, channels = a->in_channels;
    size_t frequencies = (size_t)a->column_tiles * LANES, size = (size_t)a->columns * PAIR;
    size_t tile_step = (size_t)high * frequencies * PAIR;
    const float *half = run->half + image * run->half_step + first * tile_step;

    float *spare = work, *padded = work + (size_t)(high + 1) * size;
    float **results = (float **)(padded + channels + a->taps + LANES);
    results = (float **)(((uintptr_t)results + 63) & ~(uintptr_t)63);
    float *next = work + size;
    for (int u = 0; u < high; u++, next += size) {
        const float *from = half + u * frequencies * PAIR;
        /* A last tile without a partner goes with itself. */
        join_tiles(a, from, from + (tiles - 1) * tile_step, spare);
        results[u] = invert(&a->column_transform, spare, next);
        if (results[u] == spare) spare = next;
    }

    Gates gates = {run, padded, NULL, NULL, {0}};
    if (a->taps) {
        int before = a->taps / 2;
        for (int i = 0; i < channels + a->taps; i++) {
            int at = i - before;
            padded[i] = at < 0 || at >= channels ? 0 : run->average[image * channels + at];
        }
    }
    if (run->column_scale)
        gates.column_scale = run->column_scale + image * run->scale_rows * a->columns;
    size_t row = (size_t)high * a->columns;
    float block[LANES * LANES] __attribute__((aligned(64)));
    for (int tile = 0; tile < tiles; tile++) {
        int start = (first + tile) * LANES, left = a->out_channels - start;
        gates.local = a->local + (size_t)(first + tile) * high * wide * a->taps * LANES;
        for (int l = 0; l < LANES; l++) {
            size_t at = image * run->row_scale_step + start + (l < left ? l : 0);
            gates.row_scale[l] = run->row_scale ? run->row_scale[at] : 1.0f;
        }
        float *to = run->output + (image * a->out_channels + start) * row;
        int count = 0, part = tile * LANES;
#define PUT(u, v, i)                                                                         \
    modulate(&gates, results[u] + ((size_t)(i) * wide + (v)) * PAIR + part, u, v, i,         \
             block + count * LANES);                                                         \
    if (++count == LANES) {                                                                  \
        write_weights(block, count, to, row, left);                                          \
        to += count;                                                                         \
        count = 0;                                                                           \
    }
        if (a->by_rows) {
            for (int u = 0; u < high; u++)
                for (int i = 0; i < channels; i++)
                    for (int v = 0; v < wide; v++) { PUT(u, v, i) }
        } else {
            for (int i = 0; i < channels; i++)
                for (int u = 0; u < high; u++)
                    for (int v = 0; v < wide; v++) { PUT(u, v, i) }
        }
#undef PUT
        if (count) write_weights(block, count, to, row, left);
    }
}
