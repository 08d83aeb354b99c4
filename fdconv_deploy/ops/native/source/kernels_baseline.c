/* The kernels for any processor: SSE on x86-64, Advanced SIMD on AArch64. */
#include <string.h>

#include "assembly.h"
#include "bands.h"

#define WIDTH 4
#include "lanes.h"
#include "transform.h"
#include "product.h"
#include "assembly_kernels.h"
#include "bands_kernels.h"

const AssemblyKernels assembly_baseline = {"baseline", rows_unit, columns_unit};
const BandKernels bands_baseline = {band_products, band_maps, band_planes};
