#include "batch_norm_kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include "target.h"

#if defined(__GNUC__)
#pragma GCC diagnostic ignored "-Wpsabi"
#if !defined(__clang__)
// _mm512_undefined_ps() in the compiler's own header.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#endif

MODEPROBE_TARGET_AVX512

namespace modeprobe::cpu {
namespace avx512 {
#define MODEPROBE_ISA_WIDTH 512
// clang-format off: the order matters, and none of these stands alone
#include "lanes.h"
#include "activation.h"
#include "batch_norm_loops.h"
#include "batch_norm_forward_loops.h"
#include "batch_norm_backward_loops.h"
#include "batch_norm_table.h"
// clang-format on
}  // namespace avx512

const Kernels& batch_norm_kernels_avx512() { return avx512::kKernels; }

}  // namespace modeprobe::cpu

MODEPROBE_TARGET_END

#endif
