/* What the operators share: what the runtime asks, reading tensors, errors, workspaces. */
#ifndef FDCONV_OP_H
#define FDCONV_OP_H

#include "node.h"

#define CHECK(call)                                                                           \
    do {                                                                                      \
        OrtStatus *status_ = (call);                                                          \
        if (status_) return status_;                                                          \
    } while (0)

/* run_NAME: one unit of a parallel loop, by `kernels->NAME`, for `run`, a RUN, which notes where
 * there is no memory for the FLOATS of its workspace. */
#define STEP(NAME, RUN, FLOATS)                                                               \
    static void run_##NAME(void *data, size_t unit) {                                         \
        RUN *run = data;                                                                      \
        float *work = workspace(FLOATS);                                                      \
        if (work)                                                                             \
            kernels->NAME(run, unit, work);                                                   \
        else                                                                                  \
            run->failed = 1;                                                                  \
    }

typedef struct Op Op;

/* The head of a kernel, which is made for one node. */
typedef struct {
    const OrtApi *api;
    const Op *op;
} Kernel;

/* The head of an operator, which has one variadic input and one variadic float output. `make` fills a
 * kernel of `kernel_size` bytes, all zeros but the head; `release` frees what it holds, also
 * where it was not made to the end. */
struct Op {
    OrtCustomOp op; /* first, so that the runtime's pointer to it is one to this */
    int least_inputs;
    size_t kernel_size;
    OrtStatus *(*make)(Kernel *kernel, const OrtKernelInfo *info);
    OrtStatus *(*compute)(void *kernel, OrtKernelContext *context);
    void (*release)(Kernel *kernel);
    char name[112];
};

/* Tells the runtime of an operator whose head is filled but for `op`. */
OrtStatus *add_op(OrtCustomOpDomain *domain, const OrtApi *api, Op *op);

OrtStatus *failure(const Kernel *kernel, const char *why);

OrtStatus *read_input(const Kernel *kernel, OrtKernelContext *context, int index, Tensor *to);
/* An input where it is constant, else its `data` stays NULL. */
OrtStatus *read_constant(const Kernel *kernel, const OrtKernelInfo *info, size_t index, Tensor *to);
/* An attribute that is an integer within 0 and MOST_LENGTH. */
OrtStatus *read_int(const Kernel *kernel, const OrtKernelInfo *info, const char *name, int *to);
/* Whether an attribute is there and not 0. */
int read_flag(const Kernel *kernel, const OrtKernelInfo *info, const char *name);
/* An attribute of integers within -1 and MOST_LENGTH: `*to`, to be freed, holds `*count`. */
OrtStatus *read_ints(const Kernel *kernel, const OrtKernelInfo *info, const char *name, int **to,
                     size_t *count);
/* An attribute of two such integers. */
OrtStatus *read_pair(const Kernel *kernel, const OrtKernelInfo *info, const char *name, int *first,
                     int *second);
OrtStatus *read_float(const Kernel *kernel, const OrtKernelInfo *info, const char *name,
                      float *to);
OrtStatus *make_output(const Kernel *kernel, OrtKernelContext *context, int index,
                       const int64_t *shape, int rank, float **to);
/* Units in as many batches: threads take them as they come. */
OrtStatus *parallel(const Kernel *kernel, OrtKernelContext *context,
                    void (*step)(void *run, size_t unit), size_t units, void *run);

/* This thread's workspace, aligned to 64 bytes; NULL without memory. One for all operators; it
 * grows to what the largest asks for, and goes when the thread does. */
float *workspace(size_t floats);
/* The same for what an operator's call shares among its threads. */
float *call_space(size_t floats);

#endif
