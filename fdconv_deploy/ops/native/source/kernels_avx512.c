/* The kernels for AVX-512. */
#if defined(__x86_64__)
#define TARGET "avx2,fma,avx512f,avx512vl,avx512dq,avx512bw"
#define WIDTH 16
#define KERNELS kernels_avx512
#include "kernels_body.h"
#endif
