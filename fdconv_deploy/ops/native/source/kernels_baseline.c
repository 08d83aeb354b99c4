/* The kernels for any processor: SSE on x86-64, Advanced SIMD on AArch64. */
#include "assembly.h"

#define WIDTH 4
#include "lanes.h"
#include "transform.h"
#include "assembly_kernels.h"

const AssemblyKernels assembly_baseline = {"baseline", rows_unit, columns_unit};
