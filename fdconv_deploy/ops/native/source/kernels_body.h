/* All kernels of one instruction set; included once for each.
 *
 * The file that includes it defines WIDTH, the floats of a vector, KERNELS, what to call the
 * result, and TARGET, the instruction set as compilers call it, where it is not what they
 * compile for anyway.
 */
#include <math.h>
#include <string.h>

#include "kernels.h"

#ifdef TARGET
#include <immintrin.h>
#define PRAGMA_OF(text) _Pragma(#text)
#define PRAGMA(text) PRAGMA_OF(text)
#if defined(__clang__)
PRAGMA(clang attribute push(__attribute__((target(TARGET))), apply_to = function))
#else
PRAGMA(GCC target(TARGET))
#endif
#endif

#include "lanes.h"
#include "transform.h"
#include "product.h"
#include "assembly_kernels.inc"
#include "attention_kernels.inc"
#include "blocked_bands_kernels.inc"

const Kernels KERNELS = {{rows_unit, columns_unit},
                         {attention_sums, attention_averages, attention_hidden, attention_active,
                          attention_heads, attention_softmax},
                         {blocked_band_maps, blocked_band_blocks, blocked_band_project,
                          blocked_band_transform, blocked_band_weigh}};

#if defined(TARGET) && defined(__clang__)
#pragma clang attribute pop
#endif
