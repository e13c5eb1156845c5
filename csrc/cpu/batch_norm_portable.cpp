#include "batch_norm_kernels.h"

#include "target.h"

#if defined(__GNUC__)
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

namespace modeprobe::cpu {
namespace portable {
#define MODEPROBE_ISA_WIDTH 128
// clang-format off: the order matters, and none of these stands alone
#include "lanes.h"
#include "activation.h"
#include "batch_norm_loops.h"
#include "batch_norm_forward_loops.h"
#include "batch_norm_backward_loops.h"
#include "batch_norm_table.h"
// clang-format on
}  // namespace portable

const Kernels& batch_norm_kernels_portable() { return portable::kKernels; }

}  // namespace modeprobe::cpu
