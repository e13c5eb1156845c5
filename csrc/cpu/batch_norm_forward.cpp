// Batch normalisation forward: training, evaluation, and the statistics alone.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <cstring>

#include "batch_norm_tensors.h"
#include "modeprobe/moments.cuh"

namespace modeprobe::cpu {
namespace {

// The moments of all sets together. Every set is at hand, so one weighted mean and one sum of squared
// deviations from it do, both in double; with two sets this is Chan's formula.
Moments<double> pool(const Partials& partials, int64_t channel) {
  int64_t n = 0;
  double sum = 0;
  partials.for_each(channel, [&](int64_t count, double mean, double) {
    n += count;
    sum += double(count) * mean;
  });
  const double mean = sum / double(n);
  double m2 = 0;
  partials.for_each(channel, [&](int64_t count, double part, double squares) {
    const double off = part - mean;
    m2 += squares + double(count) * off * off;
  });
  return {n, mean, m2};
}

// Per-channel operands of a loop: rows repeat them side by side and pad them to whole vectors.
struct Operands {
  int64_t repeat = 1, length;
  explicit Operands(const View& v) : length(v.c) {
    if (!v.rows) return;
    const RowTiling t(v);
    repeat = t.repeat;
    length = t.padded();
  }
  template <class A>
  void widen(A* p, int64_t c) const {
    for (int64_t j = c; j < repeat * c; ++j) p[j] = p[j - c];
  }
};

template <class T>
struct ForwardJob {
  using A = acc_t<T>;
  const KernelTable<T>& kernels;
  const View view;
  const Operands operands;
  Normalize<T> args;
  double eps = 0;
  A* statistics = nullptr;  // (2, C): mean, invstd
  const double *weight = nullptr, *bias = nullptr;
  Scratch<double> moments;  // (2, C): mean, M2
  Scratch<A> params;        // mean, scale, bias

  ForwardJob(const KernelTable<T>& k, const View& v)
      : kernels(k), view(v), operands(v), args{}, moments(2 * v.c), params(3 * operands.length) {
    args.mean = params.get();
    args.scale = params.get() + operands.length;
    args.bias = params.get() + 2 * operands.length;
  }

  void set(int64_t c, double mean, double variance) {
    const A centre = A(mean), invstd = A(1 / std::sqrt(variance + eps));
    if (statistics) {
      statistics[c] = centre;
      statistics[view.c + c] = invstd;
    }
    params.get()[c] = centre;
    params.get()[operands.length + c] = A(weight[c]) * invstd;
    params.get()[2 * operands.length + c] = A(bias[c]);
  }

  void reduce(Planes tile, int64_t, double* mean, double* m2) {
    kernels.plane_moments(args.input, tile, mean, m2);
  }

  void reduce_unit(Rows unit, int64_t tile_rows, double* mean, double* m2) {
    const int64_t padded = ceil_div(unit.width, kPad) * kPad;
    Scratch<A> near(padded);
    Scratch<double> tile(2 * padded);
    double *tile_mean = tile.get(), *tile_m2 = tile.get() + padded;
    int64_t n = 0;
    for (int64_t r = 0; r < unit.rows; r += tile_rows) {
      const int64_t rows = std::min(tile_rows, unit.rows - r);
      const Rows part{unit.begin + r * unit.width, rows, unit.width};
      if (r == 0) {
        kernels.row_moments(args.input, part, mean, m2, near.get());
      } else {
        kernels.row_moments(args.input, part, tile_mean, tile_m2, near.get());
        const double share = double(rows) / double(n + rows), weight_of_gap = double(n) * share;
        for (int64_t j = 0; j < unit.width; ++j) {
          const double delta = tile_mean[j] - mean[j];
          mean[j] += delta * share;
          m2[j] += tile_m2[j] + delta * delta * weight_of_gap;
        }
      }
      n += rows;
    }
  }

  void finish(int64_t c, int64_t at, const Partials& partials) {
    const Moments<double> all = pool(partials, at);
    moments.get()[c] = all.mean;
    moments.get()[view.c + c] = all.m2;
    if (weight) set(c, all.mean, all.m2 / double(all.n));
  }

  void widen(int64_t c, int64_t) {
    for (int k = 0; k < 3; ++k) operands.widen(params.get() + k * operands.length, c);
  }

  void apply(Planes tile, int64_t c) {
    Normalize<T> a = args;
    a.mean += c;
    a.scale += c;
    a.bias += c;
    kernels.plane_normalize(a, tile);
  }
  void apply(Rows tile) { kernels.row_normalize(args, tile); }

  void run(bool reduce, bool do_apply) {
    if (view.rows) {
      run_rows(*this, view, RowTiling(view), reduce, do_apply);
    } else {
      run_planes(*this, view, reduce, do_apply);
    }
  }
};

// The running buffers, and the rule by which a batch is folded in.
struct Running {
  const MaybeTensor &mean, &var, &counter, &skipped;
  std::optional<double> momentum;

  void check(int64_t channels) const {
    check_channels(mean, channels, "running_mean");
    check_channels(var, channels, "running_var");
    for (const auto& [tensor, name] :
         {std::pair{&counter, "num_batches_tracked"}, {&skipped, "skipped_batches"}})
      STD_TORCH_CHECK(!tensor->has_value() || ((*tensor)->scalar_type() == ScalarType::Long &&
                                               (*tensor)->numel() == 1 && (*tensor)->is_cpu()),
                      "batch_norm: ", name, " must be one int64 on the CPU");
    STD_TORCH_CHECK(momentum.has_value() || counter.has_value() || !mean.has_value(),
                    "batch_norm: momentum=None needs num_batches_tracked, which counts the batches");
  }

  // `means` and `m2` per channel, from n values each.
  void fold(int64_t channels, int64_t n, const double* means, const double* m2) const {
    if (skipped.has_value() && n > 0) {
      bool finite = true;
      for (int64_t c = 0; c < channels; ++c)
        finite &= std::isfinite(means[c]) && std::isfinite(static_cast<float>(m2[c] / double(n)));
      if (!finite) {
        ++*mutable_data<int64_t>(*skipped);
        return;
      }
    }
    if (counter.has_value()) ++*mutable_data<int64_t>(*counter);
    if (n < 2) return;  // no unbiased variance
    const double f = momentum.has_value()  ? *momentum
                     : counter.has_value() ? 1 / double(*data<int64_t>(*counter))
                                           : 0;
    std::vector<double> old(channels);
    const auto blend = [&](const MaybeTensor& buffer, auto&& batch) {
      if (!buffer.has_value()) return;
      Tensor target = *buffer;
      read_channels(target, 0, channels, old.data());
      for (int64_t c = 0; c < channels; ++c) old[c] = f == 1 ? batch(c) : (1 - f) * old[c] + f * batch(c);
      write_channels(target, channels, old.data());
    };
    blend(mean, [&](int64_t c) { return means[c]; });
    blend(var, [&](int64_t c) { return m2[c] / double(n - 1); });
  }
};

using Output = std::tuple<Tensor, Tensor, Tensor>;

Tensor new_sign_bits(bool wanted, const View& v) {
  const int64_t bytes = wanted ? ceil_div(v.numel(), 8) : 0;
  Tensor bits = empty_vector(bytes, ScalarType::Byte);
  if (bytes) std::memset(bits.mutable_data_ptr(), 0, static_cast<size_t>(bytes));
  return bits;
}

Output batch_norm_train(const Tensor& input_in, const MaybeTensor& weight, const MaybeTensor& bias,
                        const MaybeTensor& running_mean, const MaybeTensor& running_var,
                        const MaybeTensor& num_batches_tracked, const MaybeTensor& skipped_batches,
                        std::optional<double> momentum, double eps, const MaybeTensor& residual,
                        int64_t activation, double slope, const MaybeTensor& key, double p,
                        bool save_sign_bits) {
  const Geometry g = geometry_of(input_in);
  const View& v = g.view;
  const ScalarType type = input_in.scalar_type();
  check_channels(weight, v.c, "weight");
  check_channels(bias, v.c, "bias");
  const Running running{running_mean, running_var, num_batches_tracked, skipped_batches, momentum};
  running.check(v.c);
  const Tensor input = in_layout(input_in, g, "input");
  EpilogueTensors epilogue(g, type, residual, activation, slope, key, p);

  Tensor output = empty_as(g, type);
  Tensor statistics = empty_strided({2, v.c}, {v.c, 1}, accumulate_type(type));
  Tensor sign_bits = new_sign_bits(save_sign_bits, v);
  if (v.numel() == 0) {
    std::memset(statistics.mutable_data_ptr(), 0,
                static_cast<size_t>(statistics.numel()) * statistics.element_size());
    running.fold(v.c, 0, nullptr, nullptr);
    return {output, statistics, sign_bits};
  }
  if (save_sign_bits) epilogue.sign_bits = sign_bits;
  std::vector<double> affine(2 * v.c);
  read_channels(weight, 1, v.c, affine.data());
  read_channels(bias, 0, v.c, affine.data() + v.c);
  with_type(type, [&]<class T>(T, const KernelTable<T>& kernels) {
    ForwardJob<T> job(kernels, v);
    job.args.input = data<T>(input);
    job.args.output = mutable_data<T>(output);
    job.args.stream = streams(output);
    job.args.epilogue = epilogue.get<T>();
    job.eps = eps;
    job.statistics = mutable_data<acc_t<T>>(statistics);
    job.weight = affine.data();
    job.bias = affine.data() + v.c;
    job.run(true, true);
    running.fold(v.c, v.per_channel(), job.moments.get(), job.moments.get() + v.c);
  });
  return {output, statistics, sign_bits};
}

Output batch_norm_eval(const Tensor& input_in, const Tensor& mean, const Tensor& variance,
                       const MaybeTensor& weight, const MaybeTensor& bias, double eps,
                       const MaybeTensor& residual, int64_t activation, double slope, const MaybeTensor& key,
                       double p, bool save, bool save_sign_bits) {
  const Geometry g = geometry_of(input_in);
  const View& v = g.view;
  const ScalarType type = input_in.scalar_type();
  check_channels(mean, v.c, "mean");
  check_channels(variance, v.c, "variance");
  check_channels(weight, v.c, "weight");
  check_channels(bias, v.c, "bias");
  const Tensor input = in_layout(input_in, g, "input");
  EpilogueTensors epilogue(g, type, residual, activation, slope, key, p);

  Tensor output = empty_as(g, type);
  Tensor statistics = save ? empty_strided({2, v.c}, {v.c, 1}, accumulate_type(type))
                           : empty_strided({0}, {1}, accumulate_type(type));
  Tensor sign_bits = new_sign_bits(save_sign_bits, v);
  if (save_sign_bits) epilogue.sign_bits = sign_bits;
  std::vector<double> per_channel(4 * v.c);
  double *means = per_channel.data(), *variances = means + v.c, *weights = variances + v.c,
         *biases = weights + v.c;
  read_channels(mean, 0, v.c, means);
  read_channels(variance, 0, v.c, variances);
  read_channels(weight, 1, v.c, weights);
  read_channels(bias, 0, v.c, biases);
  with_type(type, [&]<class T>(T, const KernelTable<T>& kernels) {
    ForwardJob<T> job(kernels, v);
    job.args.input = data<T>(input);
    job.args.output = mutable_data<T>(output);
    job.args.stream = streams(output);
    job.args.epilogue = epilogue.get<T>();
    job.eps = eps;
    job.statistics = save ? mutable_data<acc_t<T>>(statistics) : nullptr;
    job.weight = weights;
    job.bias = biases;
    for (int64_t c = 0; c < v.c; ++c) job.set(c, means[c], variances[c]);
    job.widen(v.c, 1);
    if (v.numel() > 0) job.run(false, true);
  });
  return {output, statistics, sign_bits};
}

Tensor moments_as(const Tensor& input_in, ScalarType out_type) {
  const Geometry g = geometry_of(input_in);
  const View& v = g.view;
  const Tensor input = in_layout(input_in, g, "input");
  std::vector<double> all(2 * v.c + 2, 0.0);
  with_type(input_in.scalar_type(), [&]<class T>(T, const KernelTable<T>& kernels) {
    if (v.numel() == 0) return;
    ForwardJob<T> job(kernels, v);
    job.args.input = data<T>(input);
    job.run(true, false);
    std::copy(job.moments.get(), job.moments.get() + 2 * v.c, all.data());
    split_count<double>(v.per_channel(), all.data() + 2 * v.c, all.data() + 2 * v.c + 1);
  });
  Tensor out = empty_vector(2 * v.c + 2, out_type);
  write_channels(out, 2 * v.c + 2, all.data());
  return out;
}

Tensor batch_norm_moments(const Tensor& input) {
  return moments_as(input, accumulate_type(input.scalar_type()));
}

Tensor batch_norm_moments_double(const Tensor& input) { return moments_as(input, ScalarType::Double); }

Output batch_norm_merge(const Tensor& moments, const MaybeTensor& running_mean,
                        const MaybeTensor& running_var, const MaybeTensor& num_batches_tracked,
                        const MaybeTensor& skipped_batches, std::optional<double> momentum) {
  const ScalarType type = moments.scalar_type();
  STD_TORCH_CHECK(moments.dim() == 2 && moments.size(1) >= 2 && moments.size(1) % 2 == 0 &&
                      (type == ScalarType::Float || type == ScalarType::Double) && moments.is_cpu() &&
                      moments.is_contiguous(),
                  "batch_norm: moments must be a contiguous (K, 2 * C + 2) float32 or float64 tensor");
  const int64_t sets = moments.size(0), width = moments.size(1), channels = (width - 2) / 2;
  const Running running{running_mean, running_var, num_batches_tracked, skipped_batches, momentum};
  running.check(channels);
  std::vector<double> merged(3 * channels);
  double *means = merged.data(), *m2 = means + channels, *variances = m2 + channels;
  int64_t n = 0;
  const auto fold = [&](const auto* from) {
    for (int64_t c = 0; c < channels; ++c) {
      Moments<double> all{0, 0, 0};
      for (int64_t k = 0; k < sets; ++k) {
        const auto* set = from + k * width;
        all = merge(all, Moments<double>{join_count(set[width - 2], set[width - 1]), double(set[c]),
                                         double(set[channels + c])});
      }
      means[c] = all.mean;
      m2[c] = all.m2;
      variances[c] = all.n ? all.m2 / double(all.n) : 0;
    }
    for (int64_t k = 0; k < sets; ++k)
      n += join_count(from[k * width + width - 2], from[k * width + width - 1]);
  };
  type == ScalarType::Double ? fold(data<double>(moments)) : fold(data<float>(moments));
  Tensor mean = empty_vector(channels, type), variance = empty_vector(channels, type),
         count = empty_vector(1, type);
  write_channels(mean, channels, means);
  write_channels(variance, channels, variances);
  const double total = double(n);
  write_channels(count, 1, &total);
  running.fold(channels, n, means, m2);
  return {mean, variance, count};
}

}  // namespace
}  // namespace modeprobe::cpu

STABLE_TORCH_LIBRARY_IMPL(modeprobe, CPU, m) {
  m.impl("batch_norm_train", TORCH_BOX(&modeprobe::cpu::batch_norm_train));
  m.impl("batch_norm_eval", TORCH_BOX(&modeprobe::cpu::batch_norm_eval));
  m.impl("batch_norm_moments", TORCH_BOX(&modeprobe::cpu::batch_norm_moments));
  m.impl("batch_norm_moments_double", TORCH_BOX(&modeprobe::cpu::batch_norm_moments_double));
  m.impl("batch_norm_merge", TORCH_BOX(&modeprobe::cpu::batch_norm_merge));
}
