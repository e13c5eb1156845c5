#include "dispatch.h"
#include "modeprobe/dropout.cuh"

namespace emulated {

void dropout(Dtype dtype, const void* x, void* y, int64_t n, const int64_t* key, uint64_t offset, Rate rate) {
  dispatch(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    check(modeprobe::launch_dropout_forward<T>(static_cast<const T*>(x), static_cast<T*>(y), n, key, offset,
                                               rate.p, rate.on_device, rate.scaled, nullptr));
  });
}

void dropout_mask(uint8_t* mask, int64_t n, const int64_t* key, uint64_t offset, Rate rate) {
  check(modeprobe::launch_dropout_mask(mask, n, key, offset, rate.p, rate.on_device, nullptr));
}

void fold_in(int64_t* out, const int64_t* key, uint64_t n) {
  check(modeprobe::launch_fold_in(out, key, n, nullptr, nullptr));
}

}  // namespace emulated
