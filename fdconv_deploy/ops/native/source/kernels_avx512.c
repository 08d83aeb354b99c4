/* The kernels for AVX-512. */
#include <string.h>

#include "assembly.h"
#include "bands.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,avx512f,avx512vl,avx512dq,avx512bw"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,avx512f,avx512vl,avx512dq,avx512bw")
#endif

#define WIDTH 16
#include "lanes.h"
#include "transform.h"
#include "product.h"
#include "assembly_kernels.h"
#include "bands_kernels.h"

const AssemblyKernels assembly_avx512 = {"AVX-512", rows_unit, columns_unit};
const BandKernels bands_avx512 = {band_products, band_maps, band_planes};

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
