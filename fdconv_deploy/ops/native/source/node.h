/* What a node of the graph gives an operator when it is made. */
#ifndef FDCONV_NODE_H
#define FDCONV_NODE_H

#include "assembly.h"
#include "ort_api.h"

enum { MOST_RANK = 8, MOST_INPUTS = 24 };

/* A constant input, or one known at run time only (`data` is NULL then). */
typedef struct {
    const void *data;
    int type, rank;
    int64_t shape[MOST_RANK];
} Tensor;

/* Which inputs a node has: told by its operator's name. */
typedef struct {
    int column_stages, row_stages;
    int planes, local, column_scale, row_scale, spatial, by_rows;
} Form;

typedef struct {
    const Form *form;
    Tensor inputs[MOST_INPUTS];
    size_t count;
    int64_t kernel_shape[4];
    int kernel_width; /* 0 where nothing tells it */
} Node;

/* Why a node cannot be run. */
extern const char no_memory[], unknown[];

/* How many elements there are of a type; 0 where it is another, or a length is 0 or beyond what
 * any layer has, so that products of lengths may be trusted. */
size_t elements(const Tensor *tensor, int type);

/* So many bytes, at an aligned address. */
void *aligned(size_t bytes);

/* Lays a node's constants out. NULL, or why it cannot be done. */
const char *assembly_make(Assembly *assembly, const Node *node);
void assembly_free(Assembly *assembly);

/* Add every form's operator to the domain. */
OrtStatus *assembly_register(OrtCustomOpDomain *domain, const OrtApi *api);
OrtStatus *bands_register(OrtCustomOpDomain *domain, const OrtApi *api);

#endif
