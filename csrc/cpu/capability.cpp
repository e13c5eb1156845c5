#include "capability.h"

#include <torch/csrc/stable/library.h>
#include <cstdlib>
#include <string>

namespace modeprobe::cpu {
namespace {

Capability supported() {
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
  __builtin_cpu_init();
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx512) return Capability::kAvx512;
  if (avx2) return Capability::kAvx2;
#endif
  return Capability::kPortable;
}

Capability choose() {
  const Capability best = supported();
  const char* wanted = std::getenv("MODEPROBE_CPU_CAPABILITY");
  if (wanted == nullptr) return best;
  const std::string name = wanted;
  const Capability asked = name == "portable" ? Capability::kPortable
                           : name == "avx2"   ? Capability::kAvx2
                                              : Capability::kAvx512;
  return asked < best ? asked : best;
}

std::string cpu_capability() {
  switch (capability()) {
    case Capability::kAvx512:
      return "avx512";
    case Capability::kAvx2:
      return "avx2";
    default:
      return "portable";
  }
}

}  // namespace

Capability capability() {
  static const Capability chosen = choose();
  return chosen;
}

}  // namespace modeprobe::cpu

STABLE_TORCH_LIBRARY_IMPL(modeprobe, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&modeprobe::cpu::cpu_capability));
}
