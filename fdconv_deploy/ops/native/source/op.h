/* What the operators share: reading tensors, errors, workspaces, the processor. */
#ifndef FDCONV_OP_H
#define FDCONV_OP_H

#include "node.h"

#define CHECK(call)                                                                           \
    do {                                                                                      \
        OrtStatus *status_ = (call);                                                          \
        if (status_) return status_;                                                          \
    } while (0)

OrtStatus *failure(const OrtApi *api, const char *name, const char *why);

/* Shape, type and data of a tensor. */
OrtStatus *read_tensor(const OrtApi *api, const OrtValue *value, Tensor *to);
OrtStatus *read_input(const OrtApi *api, OrtKernelContext *context, int index, Tensor *to);
/* An input where it is constant, else its `data` stays NULL. */
OrtStatus *read_constant(const OrtApi *api, const OrtKernelInfo *info, size_t index, Tensor *to);

/* This thread's workspace, aligned to 64 bytes; NULL without memory. One for all operators; it
 * grows to what the largest asks for, and goes when the thread does. */
float *workspace(size_t floats);

/* 0: baseline, 1: AVX2, 2: AVX-512. The environment's FDCONV_NATIVE_ISA (baseline, avx2) holds it
 * down, for tests. */
int instruction_set(void);

/* An operator of one variadic input and one float output, its own functions still missing. */
OrtCustomOp variadic_op(void);

#endif
