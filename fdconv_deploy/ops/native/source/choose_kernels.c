/* Which kernels this processor runs. */
#include <stdlib.h>
#include <string.h>

#include "kernels.h"

static const Kernels *best_kernels(void) {
    const Kernels *best = &kernels_baseline;
#if defined(__x86_64__)
    const char *most = getenv("FDCONV_NATIVE_ISA");
    if (most && !strcmp(most, "baseline")) return best;
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        best = &kernels_avx2;
        if (most && !strcmp(most, "avx2")) return best;
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw"))
            best = &kernels_avx512;
    }
#endif
    return best;
}

const Kernels *kernels_for_block(int block) {
    const Kernels *best = best_kernels();
#if defined(__x86_64__)
    if (block == 8 && best == &kernels_avx512) return &kernels_avx2;
#else
    (void)block;
#endif
    return best;
}
