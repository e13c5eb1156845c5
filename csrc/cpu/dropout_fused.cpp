// modeprobe::bias_dropout_add, softmax_dropout and their backward passes on the CPU.
#include <torch/csrc/stable/library.h>
#include <array>
#include <tuple>
#include <vector>

#include "dropout_common.h"

namespace modeprobe::cpu {
namespace {

Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

void check_same(const Tensor& a, const Tensor& b, const char* who, const char* names) {
  STD_TORCH_CHECK(a.scalar_type() == b.scalar_type() && b.is_cpu(), who, ": ", names,
                  " must have the same dtype and be on the CPU");
  bool same = a.dim() == b.dim();
  for (int64_t d = 0; same && d < a.dim(); ++d) same = a.size(d) == b.size(d);
  STD_TORCH_CHECK(same, who, ": ", names, " must have the same shape");
}

template <class Acc, class T>
void repeat(const T* bias, int64_t channels, std::vector<char>& into) {
  into.resize(size_t(channels + kTile) * sizeof(Acc));
  auto* out = reinterpret_cast<Acc*>(into.data());
  for (int64_t j = 0; j < channels + kTile; ++j) out[j] = static_cast<Acc>(bias[j % channels]);
}

// The bias in the accumulate type, followed by as much of its repetition as a tile that starts inside it
// reads.
std::vector<char> repeated_bias(const Tensor& bias) {
  const Tensor b = as_contiguous(bias);
  std::vector<char> result;
  switch (dtype_of(b)) {
    case kFloat:
      repeat<float>(static_cast<const float*>(b.const_data_ptr()), b.numel(), result);
      break;
    case kDouble:
      repeat<double>(static_cast<const double*>(b.const_data_ptr()), b.numel(), result);
      break;
    case kHalf:
      repeat<float>(static_cast<const c10::Half*>(b.const_data_ptr()), b.numel(), result);
      break;
    default:
      repeat<float>(static_cast<const c10::BFloat16*>(b.const_data_ptr()), b.numel(), result);
  }
  return result;
}

int64_t acc_size(const Tensor& tensor) { return dtype_of(tensor) == kDouble ? 8 : 4; }

Tensor bias_dropout_add(const Tensor& input, const std::optional<Tensor>& bias, const Tensor& residual,
                        const Tensor& key, double p, int64_t offset, const std::optional<Tensor>& p_tensor) {
  const char* who = "bias_dropout_add";
  check_data(input, who, "input");
  check_same(input, residual, who, "input and residual");
  const Key k = read_key(key, who);
  p = read_p(p, p_tensor, who);
  const Tensor x = as_contiguous(input), r = as_contiguous(residual);
  Tensor y = empty_output(x);
  if (x.numel() == 0) return y;
  std::vector<char> repeated;
  int64_t channels = 1;
  if (bias.has_value()) {
    STD_TORCH_CHECK(input.dim() >= 1 && bias->dim() == 1 && bias->size(0) == input.size(-1) &&
                        bias->scalar_type() == input.scalar_type() && bias->is_cpu(),
                    who, ": bias must have input's dtype, device and the shape (input.size(-1),)");
    channels = bias->numel();
    repeated = repeated_bias(*bias);
  }
  const int64_t size = int64_t(x.element_size()), acc = acc_size(x);
  const auto add = dropout_kernels().bias_add[dtype_of(x)];
  const double scale = keep_scale<double>(p);
  const auto *from = static_cast<const char*>(x.const_data_ptr()),
             *rest = static_cast<const char*>(r.const_data_ptr());
  auto* to = static_cast<char*>(y.mutable_data_ptr());
  const char* biases = bias.has_value() ? repeated.data() : nullptr;
  for_each_tile(k, p, uint64_t(offset), x.numel(),
                [&](int64_t begin, int64_t n, const uint64_t* bits) {
                  add(from + begin * size, biases ? biases + begin % channels * acc : nullptr,
                      rest + begin * size, to + begin * size, n, bits, scale);
                },
                {{from, rest, to}, 64 * size});
  return y;
}

// Sums of blocks, each (channels + kTile) long, folded onto the channels: in double, in the order of memory.
template <class Acc, class T>
void fold_sums(const std::vector<char>& sums, int64_t blocks, int64_t channels, T* out) {
  const auto* from = reinterpret_cast<const Acc*>(sums.data());
  std::vector<double> total(size_t(channels), 0.0);
  for (int64_t b = 0; b < blocks; ++b, from += channels + kTile) {
    for (int64_t j = 0; j < channels + kTile; ++j) total[size_t(j % channels)] += double(from[j]);
  }
  for (int64_t c = 0; c < channels; ++c) out[c] = static_cast<T>(static_cast<Acc>(total[size_t(c)]));
}

std::tuple<Tensor, Tensor> bias_dropout_add_backward(const Tensor& grad_output, const Tensor& key, double p,
                                                     int64_t offset, const std::optional<Tensor>& p_tensor) {
  const char* who = "bias_dropout_add_backward";
  check_data(grad_output, who, "grad_output");
  STD_TORCH_CHECK(grad_output.dim() >= 1, who, ": grad_output must have at least one dimension");
  const Key k = read_key(key, who);
  p = read_p(p, p_tensor, who);
  const Tensor dy = as_contiguous(grad_output);
  const int64_t numel = dy.numel(), channels = dy.size(-1), size = int64_t(dy.element_size()),
                acc = acc_size(dy);
  Tensor dx = empty_output(dy), grad_bias = torch::stable::new_empty(dy, {channels});
  if (numel == 0) {
    torch::stable::zero_(grad_bias);
    return {dx, grad_bias};
  }
  // Blocks do not depend on the number of threads, so neither do the sums.
  const int64_t tiles = (numel + kTile - 1) / kTile;
  const int64_t tiles_per_block = std::max<int64_t>(16, 8 * (channels + kTile) / kTile);
  const int64_t blocks = (tiles + tiles_per_block - 1) / tiles_per_block;
  std::vector<char> sums(size_t(blocks * (channels + kTile) * acc));
  const Threshold t = keep_threshold(p);
  const auto& kernels = dropout_kernels();
  const auto add = kernels.bias_sum[dtype_of(dy)];
  const double scale = keep_scale<double>(p);
  const auto* from = static_cast<const char*>(dy.const_data_ptr());
  auto* to = static_cast<char*>(dx.mutable_data_ptr());
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t first, int64_t last) {
    uint64_t bits[kTileWords + 1];
    for (int64_t b = first; b < last; ++b) {
      char* block = sums.data() + b * (channels + kTile) * acc;
      for (int64_t tile = b * tiles_per_block; tile < std::min(tiles, (b + 1) * tiles_per_block); ++tile) {
        const int64_t begin = tile * kTile, n = std::min<int64_t>(kTile, numel - begin);
        draw_tile(kernels, k, t, uint64_t(offset) + uint64_t(begin), n, bits,
                  {{from + begin * size, to + begin * size}, 64 * size});
        add(from + begin * size, to + begin * size, block + begin % channels * acc, n, bits, scale);
      }
    }
  });
  void* out = grad_bias.mutable_data_ptr();
  switch (dtype_of(dy)) {
    case kFloat:
      fold_sums<float>(sums, blocks, channels, static_cast<float*>(out));
      break;
    case kDouble:
      fold_sums<double>(sums, blocks, channels, static_cast<double*>(out));
      break;
    case kHalf:
      fold_sums<float>(sums, blocks, channels, static_cast<c10::Half*>(out));
      break;
    default:
      fold_sums<float>(sums, blocks, channels, static_cast<c10::BFloat16*>(out));
  }
  return {dx, grad_bias};
}

// Calls body(row, from, n, bits, buffer, carry) for the rows of `length`, tile by tile where a row is longer
// than one. carry = before(row, buffer), and after(row, buffer, carry), see whole rows; body may change
// carry. buffer holds a row in the accumulate type.
template <class Before, class Body, class After>
void for_each_row(Key key, double p, uint64_t first, int64_t rows, int64_t length, const Before& before,
                  const Body& body, const After& after) {
  const Threshold t = keep_threshold(p);
  const auto& kernels = dropout_kernels();
  const int64_t group = std::max<int64_t>(1, kTile / length);  // rows whose decisions are drawn together
  const int64_t groups = (rows + group - 1) / group;
  torch::stable::parallel_for(0, groups, 2, [&](int64_t begin, int64_t end) {
    std::vector<double> buffer(static_cast<size_t>(length));
    uint64_t drawn[kTileWords + 2], bits[kTileWords + 1];
    for (int64_t g = begin; g < end; ++g) {
      const int64_t from = g * group, to = std::min(rows, from + group);
      if (length <= kTile)
        draw_tile(kernels, key, t, first + uint64_t(from * length), (to - from) * length, drawn);
      for (int64_t row = from; row < to; ++row) {
        double carry = before(row, buffer.data());
        for (int64_t j = 0; j < length; j += kTile) {
          const int64_t n = std::min<int64_t>(kTile, length - j);
          if (length <= kTile) {
            copy_bits(drawn, (row - from) * length, n, bits);
          } else {
            draw_tile(kernels, key, t, first + uint64_t(row * length + j), n, bits);
          }
          body(row, j, n, static_cast<const uint64_t*>(bits), buffer.data(), carry);
        }
        after(row, buffer.data(), carry);
      }
    }
  });
}

// Where the rows of an expanded mask start, in elements.
struct MaskRows {
  RowMask row{RowMask::kNone, nullptr, 0};
  int64_t dims = 0, item = 0;
  std::array<int64_t, 64> size{}, stride{};

  MaskRows(const Tensor& scores, const std::optional<Tensor>& mask) {
    if (!mask.has_value()) return;
    const bool is_bool = mask->scalar_type() == torch::headeronly::ScalarType::Bool;
    STD_TORCH_CHECK((is_bool || mask->scalar_type() == scores.scalar_type()) && mask->is_cpu(),
                    "softmax_dropout: mask must be bool or of scores' dtype, and on the CPU");
    STD_TORCH_CHECK(mask->dim() == scores.dim(),
                    "softmax_dropout: mask must have as many dimensions as scores");
    dims = scores.dim() - 1;
    for (int64_t d = 0; d <= dims; ++d) {
      STD_TORCH_CHECK(mask->size(d) == scores.size(d) || mask->size(d) == 1,
                      "softmax_dropout: mask cannot be expanded to the shape of scores");
      size[size_t(d)] = scores.size(d);
      stride[size_t(d)] = mask->size(d) == 1 ? 0 : mask->stride(d);
    }
    row = {is_bool ? RowMask::kBool : RowMask::kAdd, mask->const_data_ptr(), stride[size_t(dims)]};
    item = int64_t(mask->element_size());
  }

  RowMask at(int64_t index) const {
    RowMask result = row;
    int64_t shift = 0;
    for (int64_t d = dims; d-- > 0; index /= size[size_t(d)]) {
      shift += index % size[size_t(d)] * stride[size_t(d)];
    }
    result.data = static_cast<const char*>(row.data) + shift * item;
    return result;
  }
};

std::tuple<Tensor, Tensor> softmax_dropout(const Tensor& scores, const std::optional<Tensor>& mask,
                                           const Tensor& key, double p, bool save, int64_t offset,
                                           const std::optional<Tensor>& p_tensor) {
  const char* who = "softmax_dropout";
  check_data(scores, who, "scores");
  STD_TORCH_CHECK(scores.dim() >= 1, who, ": scores must have at least one dimension");
  const Key k = read_key(key, who);
  p = read_p(p, p_tensor, who);
  const MaskRows masks(scores, mask);
  const Tensor x = as_contiguous(scores);
  Tensor y = empty_output(x);
  Tensor probabilities = save ? empty_output(x) : torch::stable::new_empty(x, {0});
  if (x.numel() == 0) return {y, probabilities};
  const auto& kernels = dropout_kernels();
  const auto row_kernel = kernels.softmax_row[dtype_of(x)];
  const auto drop = kernels.softmax_drop[dtype_of(x)];
  const int64_t length = x.size(-1), size = int64_t(x.element_size()), acc = acc_size(x);
  const auto* from = static_cast<const char*>(x.const_data_ptr());
  auto* to = static_cast<char*>(y.mutable_data_ptr());
  char* saved = save ? static_cast<char*>(probabilities.mutable_data_ptr()) : nullptr;
  const double scale = keep_scale<double>(p);
  for_each_row(
      k, p, uint64_t(offset), x.numel() / length, length,
      [&](int64_t row, double* buffer) {
        return row_kernel(from + row * length * size, masks.row.data ? masks.at(row) : masks.row, length,
                          buffer);
      },
      [&](int64_t row, int64_t j, int64_t n, const uint64_t* bits, double* buffer, double factor) {
        const int64_t at = (row * length + j) * size;
        drop(reinterpret_cast<const char*>(buffer) + j * acc, factor, saved ? saved + at : nullptr, to + at,
             n, bits, scale);
      },
      [](int64_t, double*, double) {});
  return {y, probabilities};
}

Tensor softmax_dropout_backward(const Tensor& grad_output, const Tensor& probabilities, const Tensor& key,
                                double p, int64_t offset, const std::optional<Tensor>& p_tensor) {
  const char* who = "softmax_dropout_backward";
  check_data(grad_output, who, "grad_output");
  check_same(grad_output, probabilities, who, "grad_output and probabilities");
  const Key k = read_key(key, who);
  p = read_p(p, p_tensor, who);
  const Tensor dy = as_contiguous(grad_output), saved = as_contiguous(probabilities);
  Tensor dx = empty_output(dy);
  if (dy.numel() == 0) return dx;
  const auto& kernels = dropout_kernels();
  const auto dot_kernel = kernels.softmax_dot[dtype_of(dy)];
  const auto grad_kernel = kernels.softmax_grad[dtype_of(dy)];
  const int64_t length = dy.size(-1), size = int64_t(dy.element_size()), acc = acc_size(dy);
  const auto *from = static_cast<const char*>(dy.const_data_ptr()),
             *probability = static_cast<const char*>(saved.const_data_ptr());
  auto* to = static_cast<char*>(dx.mutable_data_ptr());
  const double scale = keep_scale<double>(p);
  for_each_row(
      k, p, uint64_t(offset), dy.numel() / length, length, [](int64_t, double*) { return 0.0; },
      [&](int64_t row, int64_t j, int64_t n, const uint64_t* bits, double* buffer, double& dot) {
        const int64_t at = (row * length + j) * size;
        dot += dot_kernel(from + at, probability + at, n, bits, scale,
                          reinterpret_cast<char*>(buffer) + j * acc);
      },
      [&](int64_t row, double* buffer, double dot) {
        const int64_t at = row * length * size;
        grad_kernel(buffer, probability + at, dot, to + at, length);
      });
  return dx;
}

}  // namespace
}  // namespace modeprobe::cpu

STABLE_TORCH_LIBRARY_IMPL(modeprobe, CPU, m) {
  m.impl("bias_dropout_add", TORCH_BOX(&modeprobe::cpu::bias_dropout_add));
  m.impl("bias_dropout_add_backward", TORCH_BOX(&modeprobe::cpu::bias_dropout_add_backward));
  m.impl("softmax_dropout", TORCH_BOX(&modeprobe::cpu::softmax_dropout));
  m.impl("softmax_dropout_backward", TORCH_BOX(&modeprobe::cpu::softmax_dropout_backward));
}
