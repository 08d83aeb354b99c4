/* One layer's attentions: its sizes, and the steps of their work.
 *
 * average over positions -> hidden layer, its norm and ReLU -> one matrix of all heads -> gates;
 * and, where there is a local attention, the average normalised for it.
 */
#ifndef FDCONV_ATTENTION_H
#define FDCONV_ATTENTION_H

#include <stddef.h>

typedef struct AttentionKernels AttentionKernels;

enum { NO_NORM, LAYER_NORM, RMS_NORM };
enum { MOST_HEADS = 8, MOST_TILE = 64 };

/* block: channels side by side in memory, 0 of plain features. */
typedef struct {
    int channels, hidden, gates, heads, sizes[MOST_HEADS];
    int block, norm, squared, softmax, local;
    float norm_epsilon, local_epsilon;
} Attention;

/* The features' positions are cut into `chunks`, their channels into `tiles`, each of which is
 * summed by itself: (images, tiles, chunks, MOST_TILE) doubles. average: (images, I), hidden:
 * (images, A), gates: (images, N), normalised: (images, I) or NULL. */
typedef struct {
    const Attention *attention;
    const AttentionKernels *kernels;
    int images, tokens;
    size_t positions, tile, tiles, chunk, chunks;
    const float *x, *hidden_weight, *hidden_bias, *norm_weight, *norm_bias, *heads_weight,
        *heads_bias, *local_weight, *local_bias;
    double *sums;
    float *average, *hidden, *gates, *normalised;
} AttentionRun;

/* Units: a chunk of a tile of an image; an image; ROWS of the hidden layer; of the heads. */
enum { ROWS = 64 };
struct AttentionKernels {
    void (*sums)(const AttentionRun *run, size_t unit);
    void (*averages)(const AttentionRun *run, size_t unit);
    void (*hidden)(const AttentionRun *run, size_t unit);
    void (*active)(const AttentionRun *run, size_t unit);
    void (*heads)(const AttentionRun *run, size_t unit);
    void (*softmax)(const AttentionRun *run, size_t unit);
};

#endif
