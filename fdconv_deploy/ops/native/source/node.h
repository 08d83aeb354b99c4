/* What a node of the graph gives an operator when it is made. */
#ifndef FDCONV_NODE_H
#define FDCONV_NODE_H

#include "assembly.h"
#include "ort_api.h"

/* No length of any layer is beyond MOST_LENGTH, so that products of two may be trusted. */
enum { MOST_RANK = 8, MOST_INPUTS = 24, MOST_LENGTH = 1 << 24, LENT = 3 };

/* A constant input, or one known at run time only (`data` is NULL then). */
typedef struct {
    const void *data;
    int type, rank;
    int64_t shape[MOST_RANK];
} Tensor;

/* Which inputs a node has, which is what its operator's name tells, but for spectrum, patterns and
 * blocks, which may be lent; of a blocked one, its attributes: attention, [spectrum, patterns,
 * blocks,] [average, local weights,] [row scale]. */
typedef struct {
    int column_stages, row_stages, local, column_scale, row_scale, blocked;
} Form;

/* A node's inputs and attributes (fdconv_deploy/ops/frequency_assembly/__init__.py).
 * row_frequencies: of each of `slots`; column_frequencies: of each of `places`. */
typedef struct {
    const Form *form;
    Tensor inputs[MOST_INPUTS];
    size_t count, slots, places;
    int out_channels, in_channels, by_rows, taps, scaled;
    int block, filter_at, spatial_at, channel_at, lent;
    const Tensor *constants; /* spectrum, patterns, blocks: inputs, or lent ones */
    int kernel_height, kernel_width;
    int *row_frequencies, *column_frequencies;
} Node;

/* Why a node cannot be run. */
extern const char no_memory[], unknown[];

/* How many elements there are of a type; 0 where it is another, or a length is 0 or beyond
 * MOST_LENGTH. */
size_t elements(const Tensor *tensor, int type);

/* The tensors lent under a number, as long as they are; NULL if none are. */
const Tensor *lent(int64_t number);

/* So many bytes, at an aligned address. */
void *aligned(size_t bytes);

/* Bytes equal to these, which many may hold and nobody changes: these, or an earlier caller's, and
 * then these are freed. NULL without memory. unshare frees what nobody else holds, and what was
 * never shared. */
void *share(void *made, size_t bytes);
void unshare(void *data);

/* Lays a node's constants out. NULL, or why it cannot be done. */
const char *assembly_make(Assembly *assembly, const Node *node);
void assembly_free(Assembly *assembly);

/* Add every form's operator to the domain. */
OrtStatus *assembly_register(OrtCustomOpDomain *domain, OrtCustomOpDomain *blocked,
                             const OrtApi *api);
OrtStatus *blocked_bands_register(OrtCustomOpDomain *domain, const OrtApi *api);
OrtStatus *attention_register(OrtCustomOpDomain *domain, const OrtApi *api);

#endif
