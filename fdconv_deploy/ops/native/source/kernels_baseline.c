/* The kernels for any processor: SSE on x86-64, Advanced SIMD on AArch64. */
#define WIDTH 4
#define KERNELS kernels_baseline
#include "kernels_body.h"
