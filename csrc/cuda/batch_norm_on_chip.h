// The launchers for small layers, compiled apart from what calls them: two files compile side by side.
#pragma once

#include "modeprobe/batch_norm_on_chip.cuh"

#define MODEPROBE_ON_CHIP_LAUNCHERS(prefix, T)                                                          \
  prefix template cudaError_t launch_batch_norm_on_chip_forward<T>(                                     \
      const OnChipShape&, const T*, T*, const Layout&, bool, const Parameter<T>&, const Parameter<T>&,  \
      void*, const MomentsOutput<T>&, const Epilogue<T>&, cudaStream_t);                                \
  prefix template cudaError_t launch_batch_norm_on_chip_backward<T>(                                    \
      const OnChipShape&, const T*, const T*, T*, T*, const Layout&, bool, const ChannelParameters<T>&, \
      bool, const Epilogue<T>&, const GradientOutput<T>&, cudaStream_t);

namespace modeprobe {

MODEPROBE_ON_CHIP_LAUNCHERS(extern, float)
MODEPROBE_ON_CHIP_LAUNCHERS(extern, __half)
MODEPROBE_ON_CHIP_LAUNCHERS(extern, __nv_bfloat16)

}  // namespace modeprobe
