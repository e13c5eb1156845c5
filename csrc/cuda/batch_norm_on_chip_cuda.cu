// The kernels for small layers, for every dtype that they are made for.
#include "batch_norm_on_chip.h"

namespace modeprobe {

MODEPROBE_ON_CHIP_LAUNCHERS(, float)
MODEPROBE_ON_CHIP_LAUNCHERS(, __half)
MODEPROBE_ON_CHIP_LAUNCHERS(, __nv_bfloat16)

}  // namespace modeprobe
