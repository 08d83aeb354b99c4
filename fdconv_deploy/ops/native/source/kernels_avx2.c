/* The kernels for AVX2 with fused multiply-add. */
#if defined(__x86_64__)
#define TARGET "avx2,fma"
#define WIDTH 8
#define KERNELS kernels_avx2
#include "kernels_body.h"
#endif
