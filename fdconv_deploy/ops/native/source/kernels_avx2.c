/* The kernels for AVX2 with fused multiply-add. */
#include <string.h>

#include "assembly.h"
#include "bands.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#define WIDTH 8
#include "lanes.h"
#include "transform.h"
#include "product.h"
#include "assembly_kernels.h"
#include "bands_kernels.h"

const AssemblyKernels assembly_avx2 = {"AVX2", rows_unit, columns_unit};
const BandKernels bands_avx2 = {band_products, band_maps, band_planes};

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
