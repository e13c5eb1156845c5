// How a batch is cut into tiles, and in which order the tiles' results meet.
//
// The cut depends on shapes only, never on the number of threads: the same input gives the same bits.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "batch_norm_kernels.h"

namespace modeprobe::cpu {

constexpr int64_t kTileElements = 8192;      // per channel of a plane tile: 32 KB of float32, about L1
constexpr int64_t kRowTileElements = 32768;  // of a row tile: 128 KB, inside L2
constexpr int64_t kContiguousElements = 2048;
constexpr int64_t kSerialElements = 16384;
constexpr int64_t kUnits = 32;
constexpr int64_t kPad = 16;

struct View {
  int64_t n, c, inner;
  bool rows;  // channels innermost: n * inner rows of c
  int64_t numel() const { return n * c * inner; }
  int64_t per_channel() const { return n * inner; }
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t n) : data_(new T[static_cast<size_t>(n)]) {}
  T* get() { return data_.get(); }

 private:
  std::unique_ptr<T[]> data_;
};

template <class F>
void for_range(bool serial, int64_t n, const F& f) {
  if (serial || n < 2) {
    if (n > 0) f(0, n);
  } else {
    torch::stable::parallel_for(0, n, 1, f);
  }
}

// Two doubles per channel from every set of values: unit u holds reps[u] sets of count[u] values each.
struct Partials {
  const double *first, *second;
  int64_t units, unit_stride, rep_stride;
  const int64_t *reps, *count;

  template <class F>
  void for_each(int64_t channel, const F& f) const {
    for (int64_t u = 0; u < units; ++u)
      for (int64_t j = 0; j < reps[u]; ++j) {
        const int64_t at = u * unit_stride + j * rep_stride + channel;
        f(count[u], first[at], second[at]);
      }
  }
};

// A job has: reduce(Planes, first, second); reduce_unit(Rows, tile_rows, first, second), finish(channel,
// channel_in_partials, Partials), after which apply(Planes or Rows, channel) may follow.
struct PlaneTiling {
  int64_t group, groups, chunk, chunks, images, blocks;

  explicit PlaneTiling(const View& v) {
    chunks = ceil_div(v.inner, kTileElements);
    chunk = ceil_div(ceil_div(v.inner, chunks), kPad) * kPad;
    chunks = ceil_div(v.inner, chunk);
    const int64_t most = std::clamp<int64_t>(v.c / 32, 1, kMaxGroup);
    group = std::clamp<int64_t>(kContiguousElements / v.inner, 1, most);
    groups = ceil_div(v.c, group);
    images = std::clamp<int64_t>(kTileElements / std::min(chunk, v.inner), 1, v.n);
    blocks = ceil_div(v.n, images) * chunks;
  }

  Planes tile(const View& v, int64_t g, int64_t block) const {
    const int64_t n0 = block / chunks * images, s0 = block % chunks * chunk, c0 = g * group;
    return {(n0 * v.c + c0) * v.inner + s0,
            std::min(images, v.n - n0),
            v.c * v.inner,
            std::min(group, v.c - c0),
            v.inner,
            std::min(chunk, v.inner - s0)};
  }
};

template <class Job>
void run_planes(Job& job, const View& v, bool reduce, bool apply) {
  const PlaneTiling t(v);
  const bool serial = v.numel() < kSerialElements;
  const int64_t threads = serial ? 1 : torch::stable::get_num_threads();
  std::vector<int64_t> count(t.blocks), reps(t.blocks, 1);
  for (int64_t b = 0; b < t.blocks; ++b) {
    const Planes tile = t.tile(v, 0, b);
    count[b] = tile.images * tile.length;
  }
  const auto finish = [&](int64_t g, const double* first, const double* second, int64_t stride) {
    const Partials partials{first, second, t.blocks, stride, 0, reps.data(), count.data()};
    const int64_t channels = std::min(t.group, v.c - g * t.group);
    for (int64_t c = 0; c < channels; ++c) job.finish(g * t.group + c, c, partials);
  };
  // Whole channels per thread keep a channel in cache between its two passes; few channels would leave
  // threads idle, and then both passes are spread tile by tile. The bits are the same.
  if (reduce && apply && ceil_div(t.groups, threads) * threads * 4 <= 5 * t.groups) {
    for_range(serial, t.groups, [&](int64_t begin, int64_t end) {
      Scratch<double> partial(2 * t.blocks * t.group);
      for (int64_t g = begin; g < end; ++g) {
        double *first = partial.get(), *second = first + t.blocks * t.group;
        for (int64_t b = 0; b < t.blocks; ++b)
          job.reduce(t.tile(v, g, b), g * t.group, first + b * t.group, second + b * t.group);
        finish(g, first, second, t.group);
        for (int64_t b = t.blocks; b-- > 0;) job.apply(t.tile(v, g, b), g * t.group);
      }
    });
    return;
  }
  if (reduce) {
    const int64_t stride = t.blocks * t.group;
    Scratch<double> partial(2 * t.groups * stride);
    for_range(serial, t.groups * t.blocks, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        double* first = partial.get() + i * 2 * t.group;
        job.reduce(t.tile(v, i / t.blocks, i % t.blocks), i / t.blocks * t.group, first, first + t.group);
      }
    });
    for (int64_t g = 0; g < t.groups; ++g) {
      const double* first = partial.get() + g * 2 * stride;
      finish(g, first, first + t.group, 2 * t.group);
    }
  }
  if (apply) {
    // Memory order: all channels of an image, then the next image.
    for_range(serial, t.groups * t.blocks, [&](int64_t begin, int64_t end) {
      for (int64_t i = end; i-- > begin;)
        job.apply(t.tile(v, i % t.groups, i / t.groups), i % t.groups * t.group);
    });
  }
}

// Rows are widened to a multiple of sixteen elements where that stays short: `repeat` rows side by side.
struct RowTiling {
  int64_t repeat, width, rows, tail, tile_rows, unit_rows, units;

  explicit RowTiling(const View& v) {
    const int64_t total = v.n * v.inner;
    int64_t wanted = 1;
    while (wanted < kPad && v.c * wanted % kPad != 0) wanted *= 2;
    if (v.c * wanted > 4096) wanted = 1;
    while (v.c * wanted < 64) wanted *= 2;
    repeat = std::clamp<int64_t>(wanted, 1, std::max<int64_t>(1, total));
    width = v.c * repeat;
    rows = total / repeat;
    tail = total % repeat;
    tile_rows = std::max<int64_t>(8, kRowTileElements / width / 8 * 8);
    const int64_t tiles = ceil_div(rows, tile_rows);
    unit_rows = std::max<int64_t>(1, ceil_div(tiles, kUnits)) * tile_rows;
    units = ceil_div(rows, unit_rows);
  }
  int64_t padded() const { return ceil_div(width, kPad) * kPad; }
};

template <class Job>
void run_rows(Job& job, const View& v, const RowTiling& t, bool reduce, bool apply) {
  const bool serial = v.numel() < kSerialElements;
  const int64_t all = t.units + (t.tail > 0);
  const auto unit = [&](int64_t u) -> Rows {
    if (u == t.units) return {t.rows * t.width, 1, t.tail * v.c};
    const int64_t r0 = u * t.unit_rows;
    return {r0 * t.width, std::min(t.unit_rows, t.rows - r0), t.width};
  };
  if (reduce) {
    const int64_t padded = t.padded();
    Scratch<double> partial(2 * all * padded);
    std::vector<int64_t> count(all), reps(all);
    for (int64_t u = 0; u < all; ++u) {
      count[u] = unit(u).rows;
      reps[u] = u == t.units ? t.tail : t.repeat;
    }
    for_range(serial, all, [&](int64_t begin, int64_t end) {
      for (int64_t u = begin; u < end; ++u) {
        double* first = partial.get() + 2 * u * padded;
        job.reduce_unit(unit(u), t.tile_rows, first, first + padded);
      }
    });
    const Partials partials{partial.get(), partial.get() + padded, all, 2 * padded, v.c, reps.data(),
                            count.data()};
    for_range(serial || v.c * all < 4096, v.c, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) job.finish(c, c, partials);
    });
    job.widen(v.c, t.repeat);
  }
  if (apply) {
    const int64_t tile = t.tile_rows, tiles = ceil_div(t.rows, tile) + (t.tail > 0);
    for_range(serial, tiles, [&](int64_t begin, int64_t end) {
      for (int64_t i = end; i-- > begin;) {
        const int64_t r0 = i * tile;
        job.apply(r0 >= t.rows ? unit(t.units) : Rows{r0 * t.width, std::min(tile, t.rows - r0), t.width});
      }
    });
  }
}

}  // namespace modeprobe::cpu
