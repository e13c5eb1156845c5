#include "batch_norm_kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include "target.h"

#if defined(__GNUC__)
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

MODEPROBE_TARGET_AVX2

namespace modeprobe::cpu {
namespace avx2 {
#define MODEPROBE_ISA_WIDTH 256
// clang-format off: the order matters, and none of these stands alone
#include "lanes.h"
#include "activation.h"
#include "batch_norm_loops.h"
#include "batch_norm_forward_loops.h"
#include "batch_norm_backward_loops.h"
#include "batch_norm_table.h"
// clang-format on
}  // namespace avx2

const Kernels& batch_norm_kernels_avx2() { return avx2::kKernels; }

}  // namespace modeprobe::cpu

MODEPROBE_TARGET_END

#endif
