// Which instruction set the CPU kernels use. Chosen once, at load; MODEPROBE_CPU_CAPABILITY may lower it.
#pragma once

namespace modeprobe::cpu {

enum class Capability { kPortable, kAvx2, kAvx512 };

Capability capability();

}  // namespace modeprobe::cpu
