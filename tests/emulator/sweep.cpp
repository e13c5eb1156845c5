// Every kernel over sizes, alignments and schedules, on heap blocks that are exactly as large as the data:
// for the sanitizers, and for planted faults. Prints what is wrong and fails.
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>

#include "kernels.h"
#include "modeprobe/mask.cuh"
#include "scheduler.h"

using namespace emulated;

namespace {

int failures = 0;

void fail(const char* what, int64_t n, int64_t at) {
  if (failures++ < 5) std::fprintf(stderr, "WRONG: %s, size %ld, at %ld\n", what, long(n), long(at));
}

constexpr size_t kItemsize[] = {4, 2, 2, 8};

// `n` elements at `shift` elements behind a 16-byte border, and not one byte behind them.
struct Buffer {
  char* block;
  char* start;
  size_t bytes;

  Buffer(Dtype dtype, int64_t n, int shift = 0)
      : Buffer(n * kItemsize[int(dtype)], shift * kItemsize[int(dtype)]) {}
  explicit Buffer(size_t bytes, size_t shift = 0) : bytes(bytes) {
    block = static_cast<char*>(std::malloc(bytes + shift + (bytes + shift == 0)));
    start = block + shift;
    std::memset(start, 0xff, bytes);
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() { std::free(block); }

  void fill(Dtype dtype, std::mt19937& random) {
    std::normal_distribution<float> normal;
    for (size_t i = 0; i < bytes / kItemsize[int(dtype)]; ++i) {
      const float value = normal(random);
      if (dtype == Dtype::kFloat32) reinterpret_cast<float*>(start)[i] = value;
      if (dtype == Dtype::kFloat64) reinterpret_cast<double*>(start)[i] = value;
      if (dtype == Dtype::kFloat16) reinterpret_cast<_Float16*>(start)[i] = _Float16(value);
      if (dtype == Dtype::kBfloat16) {
        uint32_t bits;
        std::memcpy(&bits, &value, 4);
        reinterpret_cast<uint16_t*>(start)[i] = uint16_t(bits >> 16);
      }
    }
  }
  void expect_written(Dtype dtype, const char* what, int64_t n) const {
    const size_t size = kItemsize[int(dtype)];
    for (size_t i = 0; i < bytes / size; ++i) {
      bool poison = true;
      for (size_t k = 0; k < size; ++k) poison &= start[i * size + k] == char(0xff);
      if (poison) return fail(what, n, int64_t(i));
    }
  }
};

const int64_t kKey[2] = {1234, 5};

void sweep_dropout(Dtype dtype, int64_t n, std::mt19937& random) {
  const modeprobe::Key key{uint64_t(kKey[0]), uint64_t(kKey[1])};
  for (int shift : {0, 1})
    for (uint64_t offset : {uint64_t{0}, uint64_t{3}, uint64_t{1} << 35}) {
      Buffer x(dtype, n, shift), y(dtype, n), mask{size_t(n)};
      x.fill(dtype, random);
      dropout(dtype, x.start, y.start, n, kKey, offset, {0.1});
      dropout_mask(reinterpret_cast<uint8_t*>(mask.start), n, kKey, offset, {0.1});
      y.expect_written(dtype, "dropout leaves its output unwritten", n);
      for (int64_t i = 0; i < n; ++i) {
        const bool keep = modeprobe::keep(key, modeprobe::keep_threshold(0.1), offset + uint64_t(i));
        if (keep != bool(mask.start[i])) fail("mask differs from the contract", n, i);
        if (dtype == Dtype::kFloat32) {
          const float want =
              keep ? reinterpret_cast<float*>(x.start)[i] * modeprobe::keep_scale<float>(0.1) : 0.0f;
          if (reinterpret_cast<float*>(y.start)[i] != want) fail("dropout differs from the contract", n, i);
        }
      }
      dropout(dtype, x.start, x.start, n, kKey, offset, {0.5});
    }
}

// Long enough for some 16-bit draws to equal the threshold's upper half.
void sweep_ties() {
  const int64_t n = 1 << 19;
  const modeprobe::Key key{uint64_t(kKey[0]), uint64_t(kKey[1])};
  const modeprobe::Threshold threshold = modeprobe::keep_threshold(1.0 / 3);
  Buffer mask{size_t(n)};
  dropout_mask(reinterpret_cast<uint8_t*>(mask.start), n, kKey, 0, {1.0 / 3});
  for (int64_t i = 0; i < n; ++i)
    if (modeprobe::keep(key, threshold, uint64_t(i)) != bool(mask.start[i]))
      fail("mask differs from the contract", n, i);
}

double mean_of(const float* x, int64_t n, int64_t c, int64_t s, int64_t channel, bool channels_last) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < s; ++j)
      sum += x[channels_last ? (i * s + j) * c + channel : (i * c + channel) * s + j];
  return sum / double(n * s);
}

// The kernels of one launch against those of two, whose results are want_y and `want`, the statistics.
void sweep_on_chip(Dtype dtype, BatchNorm layer, const Buffer& x, const Buffer& dy, const Buffer& residual,
                   const Buffer& want_y, const Buffer& want) {
  const int64_t numel = layer.n * layer.c * layer.s;
  Buffer y(dtype, numel), dx(dtype, numel), d_residual(dtype, numel), d_weight(Dtype::kFloat32, layer.c),
      d_bias(Dtype::kFloat32, layer.c), statistics(Dtype::kFloat32, 2 * layer.c), bits{size_t(numel + 7) / 8};
  int64_t batches = 0, skipped = 0;
  layer.batches = &batches;
  layer.skipped = layer.has_momentum ? nullptr : &skipped;
  layer.on_chip = true;
  batch_norm_train(dtype, layer, x.start, y.start, statistics.start);
  if (batches != 1) fail("batches are not counted", numel, batches);
  y.expect_written(dtype, "batch norm in one launch leaves its output unwritten", numel);
  for (int64_t k = 0; k < 2 * layer.c; ++k) {
    const float a = reinterpret_cast<float*>(statistics.start)[k],
                b = reinterpret_cast<float*>(want.start)[k];
    if (!(std::fabs(a - b) <= 1e-5 * (1 + std::fabs(b)))) fail("one launch has other statistics", numel, k);
  }
  for (int64_t i = 0; dtype == Dtype::kFloat32 && i < numel; ++i) {
    const float a = reinterpret_cast<float*>(y.start)[i], b = reinterpret_cast<float*>(want_y.start)[i];
    if (!(std::fabs(a - b) <= 1e-4 * (1 + std::fabs(b)))) fail("one launch has another output", numel, i);
  }
  layer.residual = residual.start;
  layer.activation = 1;
  layer.key = kKey;
  layer.p = 0.2;
  if (layer.channels_last || layer.s % 8 == 0) layer.sign_bits = reinterpret_cast<uint8_t*>(bits.start);
  batch_norm_train(dtype, layer, x.start, y.start, statistics.start);
  batch_norm_backward(dtype, layer, true, dy.start, x.start, statistics.start, nullptr, dx.start,
                      d_residual.start, d_weight.start, d_bias.start);
  dx.expect_written(dtype, "batch norm in one launch leaves its gradient unwritten", numel);
  d_residual.expect_written(dtype, "one launch leaves the residual's gradient unwritten", numel);
  d_weight.expect_written(Dtype::kFloat32, "one launch leaves the weight's gradient unwritten", layer.c);
}

void sweep_batch_norm(Dtype dtype, int64_t n, int64_t c, int64_t s, bool channels_last,
                      std::mt19937& random) {
  const Dtype wide = dtype == Dtype::kFloat64 ? dtype : Dtype::kFloat32;
  for (int shift : {0, 1}) {
    const int64_t numel = n * c * s;
    Buffer x(dtype, numel, shift), dy(dtype, numel), residual(dtype, numel), y(dtype, numel),
        dx(dtype, numel), d_residual(dtype, numel), weight(wide, c), bias(wide, c), d_weight(wide, c),
        d_bias(wide, c), statistics(wide, 2 * c), sums(wide, 2 * c), mean(wide, c), variance(wide, c),
        bits{size_t(numel + 7) / 8}, packed(wide, 2 * c + 2);
    for (Buffer* buffer : {&x, &dy, &residual}) buffer->fill(dtype, random);
    for (Buffer* buffer : {&weight, &bias, &mean, &variance}) buffer->fill(wide, random);
    int64_t batches = 0;
    BatchNorm layer{channels_last ? n * s : n, c, channels_last ? 1 : s, channels_last};
    layer.weight = weight.start;
    layer.bias = bias.start;
    layer.running_mean = mean.start;
    layer.running_var = variance.start;
    layer.batches = &batches;
    layer.has_momentum = shift == 0;
    batch_norm_train(dtype, layer, x.start, y.start, statistics.start);
    y.expect_written(dtype, "batch norm leaves its output unwritten", numel);
    statistics.expect_written(wide, "batch norm leaves its statistics unwritten", numel);
    if (batches != 1) fail("batches are not counted", numel, batches);
    if (dtype == Dtype::kFloat32)
      for (int64_t k = 0; k < c; ++k) {
        const double want = mean_of(reinterpret_cast<float*>(x.start), n, c, s, k, channels_last);
        const double got = reinterpret_cast<float*>(statistics.start)[k];
        if (!(std::fabs(got - want) < 1e-5)) fail("batch mean is off", numel, k);
      }
    batch_norm_backward(dtype, layer, true, dy.start, x.start, statistics.start, sums.start, dx.start,
                        nullptr, d_weight.start, d_bias.start);
    if (dtype != Dtype::kFloat64 && (c % 8 == 0 || !channels_last))
      sweep_on_chip(dtype, layer, x, dy, residual, y, statistics);
    dx.expect_written(dtype, "batch norm leaves its gradient unwritten", numel);
    batch_norm_moments(dtype, layer, x.start, packed.start);
    layer.residual = residual.start;
    layer.activation = 1;
    layer.key = kKey;
    layer.p = 0.2;
    layer.sign_bits = reinterpret_cast<uint8_t*>(bits.start);
    batch_norm_train(dtype, layer, x.start, y.start, statistics.start);
    batch_norm_backward(dtype, layer, true, dy.start, x.start, statistics.start, sums.start, dx.start,
                        d_residual.start, d_weight.start, d_bias.start);
    d_residual.expect_written(dtype, "batch norm leaves the residual's gradient unwritten", numel);
    layer.sign_bits = nullptr;
    layer.activation = 3;
    batch_norm_eval(dtype, layer, x.start, y.start, statistics.start);
    batch_norm_backward(dtype, layer, false, dy.start, x.start, statistics.start, sums.start, dx.start,
                        d_residual.start, d_weight.start, d_bias.start);
  }
}

void sweep_family(Dtype dtype, int64_t rows, int64_t columns, std::mt19937& random) {
  const int64_t n = rows * columns;
  for (int shift : {0, 1}) {
    Buffer x(dtype, n, shift), residual(dtype, n), bias(dtype, columns), y(dtype, n), d_bias(dtype, columns),
        saved(dtype, n);
    for (Buffer* buffer : {&x, &residual, &bias}) buffer->fill(dtype, random);
    const int64_t size[] = {rows, columns}, shared_rows[] = {0, 1}, shared_columns[] = {1, 0};
    structured_dropout(dtype, x.start, y.start, n, 2, size, shared_rows, kKey, 3, {0.3}, false, false);
    y.expect_written(dtype, "structured dropout leaves its output unwritten", n);
    structured_dropout(dtype, x.start, y.start, n, 2, size, shared_columns, kKey, 0, {0.3}, true, false);
    structured_dropout(dtype, x.start, y.start, n, 0, nullptr, nullptr, kKey, 3, {0.3}, true, true);
    bias_dropout_add(dtype, x.start, bias.start, residual.start, y.start, n, columns, kKey, 5, {0.3});
    Buffer dx(dtype, n, shift);
    bias_dropout_add_backward(dtype, y.start, dx.start, d_bias.start, rows, columns, kKey, 5, {0.3});
    d_bias.expect_written(dtype, "the bias gradient stays unwritten", n);
    softmax_dropout(dtype, x.start, residual.start, false, 1, size, &columns, 1, y.start, saved.start, rows,
                    columns, kKey, 1, {0.3});
    saved.expect_written(dtype, "softmax leaves its probabilities unwritten", n);
    softmax_dropout_backward(dtype, x.start, saved.start, dx.start, rows, columns, kKey, 1, {0.3});
    dx.expect_written(dtype, "softmax leaves its gradient unwritten", n);
  }
}

}  // namespace

int main() {
  try {
    std::mt19937 random(0);
    sweep_ties();
#if defined(EMULATOR_ONE_DTYPE)
    const int dtypes = 1;
#else
    const int dtypes = 4;
#endif
    for (int d = 0; d < dtypes; ++d)
      for (uint64_t seed = 0; seed < 2; ++seed) {
        emulator::settings().seed = seed;
        emulator::settings().multiprocessors = 1 + int(seed);
        for (int64_t n : {0, 1, 7, 8, 9, 111, 1023, 4097, 17000}) sweep_dropout(Dtype(d), n, random);
        for (const auto& [rows, columns] : {std::array<int64_t, 2>{1, 1}, {5, 7}, {9, 64}, {56, 301}})
          sweep_family(Dtype(d), rows, columns, random);
        for (bool channels_last : {false, true})
          for (const auto& [n, c, s] : {std::array<int64_t, 3>{2, 3, 4}, {3, 5, 37}, {9, 8, 9}, {50, 24, 7}})
            sweep_batch_norm(Dtype(d), n, c, s, channels_last, random);
      }
  } catch (const std::exception& fault) {
    std::fprintf(stderr, "FAULT: %s\n", fault.what());
    return 2;
  }
  return failures ? 1 : 0;
}
