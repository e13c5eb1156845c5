// modeprobe::structured_dropout and alpha_dropout on the CPU.
#include <torch/csrc/stable/library.h>
#include <array>
#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

#include "dropout_common.h"

namespace modeprobe::cpu {
namespace {

constexpr size_t kMaxDims = 64;

// The dimensions of dense data in memory order, outermost first, with the step that each takes in the mask;
// neighbours that step through the mask as one dimension would are merged.
struct Walk {
  std::array<int64_t, kMaxDims> size, step;
  size_t dims = 0;
  int64_t mask_numel = 1;
};

Walk plan(const Tensor& x, const std::vector<int64_t>& shared_dims, const char* who) {
  const auto sizes = x.sizes(), strides = x.strides();
  const size_t dims = sizes.size();
  std::array<int64_t, kMaxDims> step{};
  std::array<bool, kMaxDims> shared{};
  int64_t previous = -1;
  for (const int64_t d : shared_dims) {
    STD_TORCH_CHECK(d > previous && d < int64_t(dims), who,
                    ": shared_dims must be ascending and in [0, input.dim())");
    shared[size_t(d)] = true;
    previous = d;
  }
  Walk walk;
  for (size_t d = dims; d-- > 0;) {
    if (shared[d]) continue;
    step[d] = walk.mask_numel;
    walk.mask_numel *= sizes[d];
  }
  std::array<std::pair<int64_t, size_t>, kMaxDims> order;
  size_t kept = 0;
  for (size_t d = 0; d < dims; ++d) {
    if (sizes[d] != 1) order[kept++] = {strides[d], d};
  }
  std::sort(order.begin(), order.begin() + kept,
            [](const auto& a, const auto& b) { return a.first > b.first; });
  for (size_t k = 0; k < kept; ++k) {
    const size_t d = order[k].second;
    if (walk.dims > 0 && walk.step[walk.dims - 1] == step[d] * sizes[d]) {
      walk.size[walk.dims - 1] *= sizes[d];
      walk.step[walk.dims - 1] = step[d];
    } else {
      walk.size[walk.dims] = sizes[d];
      walk.step[walk.dims++] = step[d];
    }
  }
  if (walk.dims == 0) {
    walk.size[0] = 1;
    walk.step[walk.dims++] = 0;
  }
  return walk;
}

struct Job {
  DropoutKernels::Apply apply;
  Affine affine;
  const char* x;
  char* y;
  int64_t size;                   // of an element
  DropoutKernels::Stream stream;  // null where it does not pay, or the operation is more than a product

  void operator()(int64_t begin, int64_t n, const uint64_t* bits) const {
    apply(x + begin * size, y + begin * size, n, bits, affine);
  }
};

// One row of the innermost dimension, whose decisions start at `base` of the mask and are `step` apart.
void run_row(const Job& job, const uint64_t* mask, int64_t base, int64_t step, int64_t begin, int64_t n) {
  uint64_t bits[kTileWords + 1];
  if (step == 0) {
    const bool kept = mask[base >> 6] >> (base & 63) & 1;
    if (job.stream) {
      job.stream(kept ? job.x + begin * job.size : nullptr, job.y + begin * job.size, n, job.affine.scale);
      return;
    }
    if (!kept && job.affine.fill == 0.0) {
      std::memset(job.y + begin * job.size, 0, size_t(n * job.size));
      return;
    }
    std::fill_n(bits, std::min<int64_t>(kTileWords, (n + 63) / 64), kept ? ~uint64_t{0} : 0);
  }
  for (int64_t from = 0; from < n; from += kTile) {
    const int64_t count = std::min<int64_t>(kTile, n - from);
    if (step == 1) {
      copy_bits(mask, base + from, count, bits);
    } else if (step > 1) {
      std::fill_n(bits, (count + 63) / 64, 0);
      for (int64_t j = 0; j < count; ++j) {
        const int64_t i = base + (from + j) * step;
        bits[j >> 6] |= (mask[i >> 6] >> (i & 63) & 1) << (j & 63);
      }
    }
    job(begin + from, count, bits);
  }
}

void run_structured(const Job& job, Key key, double p, uint64_t first, const Walk& walk) {
  std::vector<uint64_t> mask(size_t(walk.mask_numel / 64 + 2));
  for_each_tile(key, p, first, walk.mask_numel, [&](int64_t begin, int64_t n, const uint64_t* bits) {
    std::memcpy(mask.data() + begin / 64, bits, size_t((n + 63) / 64) * 8);
  });
  const size_t outer = walk.dims - 1;
  const int64_t inner = walk.size[outer], step = walk.step[outer];
  int64_t rows = 1;
  for (size_t d = 0; d < outer; ++d) rows *= walk.size[d];
  const auto run = [&](int64_t from, int64_t to) {
    for (int64_t row = from; row < to; ++row) {
      int64_t base = 0, rest = row;
      for (size_t d = outer; d-- > 0; rest /= walk.size[d]) base += rest % walk.size[d] * walk.step[d];
      run_row(job, mask.data(), base, step, row * inner, inner);
    }
    if (job.stream) drain();
  };
  const int64_t grain = std::max<int64_t>(1, 4 * kTile / std::max<int64_t>(1, inner));
  if (rows <= grain) {
    run(0, rows);
  } else {
    torch::stable::parallel_for(0, rows, grain, run);
  }
}

Job job_for(const Tensor& x, const Tensor& y, bool shifted, Affine affine) {
  const auto& kernels = dropout_kernels();
  const int64_t size = int64_t(x.element_size());
  const Dtype dtype = dtype_of(x);
  return {(shifted ? kernels.affine : kernels.scale)[dtype],
          affine,
          static_cast<const char*>(x.const_data_ptr()),
          static_cast<char*>(y.mutable_data_ptr()),
          size,
          !shifted && leaves_caches(y) ? kernels.stream[dtype] : nullptr};
}

Tensor structured_dropout(const Tensor& input, const Tensor& key, double p, std::vector<int64_t> shared_dims,
                          int64_t offset, bool scaled, const std::optional<Tensor>& p_tensor) {
  check_data(input, "structured_dropout", "input");
  const Key k = read_key(key, "structured_dropout");
  p = read_p(p, p_tensor, "structured_dropout");
  const Tensor x = is_dense(input) ? input : torch::stable::contiguous(input);
  const Walk walk = plan(x, shared_dims, "structured_dropout");
  Tensor y = empty_output(x);
  if (x.numel() == 0) return y;
  const Job job = job_for(x, y, false, {scaled ? keep_scale<double>(p) : 1.0, 0.0, 0.0});
  run_structured(job, k, p, uint64_t(offset), walk);
  return y;
}

Affine alpha_affine(double p, bool linear) {
  constexpr double alpha = -1.7580993408473766;  // -scale * alpha of SELU
  if (p == 1.0) return {0.0, 0.0, 0.0};
  const double a = 1.0 / std::sqrt((1.0 - p) * (1.0 + p * alpha * alpha));
  if (linear) return {a, 0.0, 0.0};
  const double b = -a * alpha * p;
  return {a, b, a * alpha + b};
}

Tensor alpha_dropout(const Tensor& input, const Tensor& key, double p, std::vector<int64_t> shared_dims,
                     bool linear, int64_t offset, const std::optional<Tensor>& p_tensor) {
  check_data(input, "alpha_dropout", "input");
  const Key k = read_key(key, "alpha_dropout");
  p = read_p(p, p_tensor, "alpha_dropout");
  const Tensor x = is_dense(input) ? input : torch::stable::contiguous(input);
  const Walk walk = plan(x, shared_dims, "alpha_dropout");
  Tensor y = empty_output(x);
  if (x.numel() == 0) return y;
  const Job job = job_for(x, y, !linear, alpha_affine(p, linear));
  if (shared_dims.empty()) {
    for_each_tile(k, p, uint64_t(offset), x.numel(), job, {{job.x, job.y}, 64 * job.size});
  } else {
    run_structured(job, k, p, uint64_t(offset), walk);
  }
  return y;
}

}  // namespace
}  // namespace modeprobe::cpu

STABLE_TORCH_LIBRARY_IMPL(modeprobe, CPU, m) {
  m.impl("structured_dropout", TORCH_BOX(&modeprobe::cpu::structured_dropout));
  m.impl("alpha_dropout", TORCH_BOX(&modeprobe::cpu::alpha_dropout));
}
