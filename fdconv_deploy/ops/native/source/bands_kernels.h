/* The steps of a band modulation; included once per instruction set. */

/* One row of x, all channels, times every tap of the band convolutions. */
static void band_products(const BandRun *run, size_t unit, float *work) {
    const Bands *b = run->bands;
    size_t image = unit / b->height, row = unit % b->height;
    size_t plane = (size_t)b->height * b->width, wide = b->wide_step;
    int count = b->weighted * b->taps * b->taps;
    const float *x = run->x + image * b->channels * plane + row * b->width;
    float *to = run->products + (image * count * b->height + row) * wide;
    /* Copied first: planes a power of two apart would share a few sets of the cache. */
    for (int c = 0; c < b->channels; c++) {
        memcpy(work + c * wide, x + c * plane, b->width * sizeof(float));
        for (size_t w = b->width; w < wide; w++) work[c * wide + w] = 0;
    }
    product(count, (int)wide, b->channels, b->conv, b->channels, work, wide, to,
            b->height * wide, 0);
}

/* One row of the terms' maps: the taps' products added up, a sigmoid, the mix. */
static void band_maps(const BandRun *run, size_t unit, float *work) {
    const Bands *b = run->bands;
    int height = b->height, width = b->width, taps = b->taps, pad = taps / 2;
    size_t image = unit / height, wide = b->wide_step;
    int row = (int)(unit % height), terms = b->bands + 1;
    const float *products =
        run->products + image * b->weighted * taps * taps * height * wide;
    for (int m = 0; m < b->weighted; m++) {
        float *logit = work + m * wide;
        for (size_t w = 0; w < wide; w++) logit[w] = b->conv_bias[m];
        for (int dy = 0; dy < taps; dy++) {
            int from = row - dy + pad;
            if (from < 0 || from >= height) continue;
            for (int dx = 0; dx < taps; dx++) {
                int shift = dx - pad; /* to column w from column w - shift */
                const float *source =
                    products + ((size_t)((m * taps + dy) * taps + dx) * height + from) * wide;
                int first = shift > 0 ? shift : 0, last = shift < 0 ? width + shift : width;
                for (int w = first; w < last; w++) logit[w] += source[w - shift];
            }
        }
        for (size_t w = 0; w < wide; w += WIDTH) store(logit + w, sigmoid(load(logit + w)));
    }
    for (int term = 0; term < terms; term++) {
        float *map = run->maps + ((image * terms + term) * height + row) * wide;
        for (size_t w = 0; w < wide; w += WIDTH) {
            Vector sum = all(b->mix_bias[term]);
            for (int m = 0; m < b->weighted; m++)
                sum += load(work + m * wide + w) * b->mix[term * b->weighted + m];
            store(map + w, sum);
        }
    }
}

/* One channel of one image. */
static void band_planes(const BandRun *run, size_t unit, float *work) {
    const Bands *b = run->bands;
    int height = b->height, width = b->width, parts = b->parts, terms = b->bands + 1;
    size_t plane = (size_t)height * width, kept = b->kept_step, wide = b->wide_step;
    size_t image = unit / b->channels;
    const float *x = run->x + unit * plane;
    float *y = run->y + unit * plane;
    float *projected = work, *coefficients = projected + (size_t)parts * height * kept;
    float *back = coefficients + (size_t)b->kept_rows * kept;
    float *low = back + (size_t)b->bands * parts * height * kept;

    for (int part = 0; part < parts; part++)
        product(height, (int)kept, width, x, width, b->to_columns + (size_t)part * width * kept,
                kept, projected + part * kept, parts * kept, 0);
    product(b->kept_rows, (int)kept, parts * height, b->to_rows, (size_t)parts * height, projected,
            kept, coefficients, kept, 0);
    for (int j = 0; j < b->bands; j++) {
        const Band *band = &b->band[j];
        int columns = (band->columns + LANES - 1) / LANES * LANES;
        product(parts * height, columns, band->rows, band->from_rows, band->rows, coefficients,
                kept, back + (size_t)j * parts * height * kept, kept, 0);
    }
    for (int row = 0; row < height; row += TALL) {
        int rows = height - row < TALL ? height - row : TALL;
        for (int j = 0; j < b->bands; j++) {
            const Band *band = &b->band[j];
            const float *from = back + ((size_t)j * height + row) * parts * kept;
            for (int part = 0; part < parts; part++)
                product(rows, (int)wide, band->columns, from + part * kept, parts * kept,
                        band->from_columns + (size_t)part * band->columns * wide, wide,
                        low + (size_t)j * TALL * wide, wide, part);
        }
        const float *maps = run->maps + (image * terms * height + row) * wide;
        for (int r = 0; r < rows; r++) {
            const float *restrict in = x + (size_t)(row + r) * width;
            float *restrict out = y + (size_t)(row + r) * width;
            const float *map = maps + r * wide;
            for (int w = 0; w < width; w++) out[w] = map[w] * in[w];
            for (int j = 0; j < b->bands; j++) {
                const float *restrict weight = map + (j + 1) * height * wide;
                const float *restrict band = low + ((size_t)j * TALL + r) * wide;
                for (int w = 0; w < width; w++) out[w] += weight[w] * band[w];
            }
        }
    }
}
