/* The operators' kernels, made once for each instruction set. */
#ifndef FDCONV_KERNELS_H
#define FDCONV_KERNELS_H

#include "assembly.h"
#include "attention.h"
#include "blocked_bands.h"

typedef struct {
    AssemblyKernels assembly;
    AttentionKernels attention;
    BlockedBandKernels blocked_bands;
} Kernels;

extern const Kernels kernels_baseline;
#if defined(__x86_64__)
extern const Kernels kernels_avx2, kernels_avx512;
#endif

/* Those of the best instruction set that the processor has, whose vectors are no longer than a block
 * of channels; 0: any. The environment's FDCONV_NATIVE_ISA (baseline, avx2) holds it down, for
 * tests. */
const Kernels *kernels_for_block(int block);

#endif
