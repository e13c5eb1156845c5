// Batch normalisation backward: in one call, and its two halves.
#include <torch/csrc/stable/library.h>

#include <cstring>

#include "batch_norm_tensors.h"

namespace modeprobe::cpu {
namespace {

template <class T>
struct BackwardJob {
  using A = acc_t<T>;
  const KernelTable<T>& kernels;
  const View view;
  int64_t repeat = 1, length;
  Backward<T> args;           // of the input half
  Backward<T> reduce_args{};  // of the reduction
  const A* statistics;
  Scratch<double> sums;  // (2, C): sum(dz), sum(dz * (x - mean))
  Scratch<A> params;     // mean, scale, bias, dz_mean, x_slope

  BackwardJob(const KernelTable<T>& k, const View& v, const Tensor& stats, const MaybeTensor& weight,
              const MaybeTensor& bias)
      : kernels(k),
        view(v),
        length(v.rows ? RowTiling(v).padded() : v.c),
        args{},
        statistics(data<A>(stats)),
        sums(2 * v.c),
        params(5 * length) {
    if (v.rows) repeat = RowTiling(v).repeat;
    std::vector<double> affine(2 * v.c);
    read_channels(weight, 1, v.c, affine.data());
    read_channels(bias, 0, v.c, affine.data() + v.c);
    for (int64_t c = 0; c < v.c; ++c) {
      column(0)[c] = statistics[c];
      column(1)[c] = A(affine[c]) * statistics[v.c + c];
      column(2)[c] = A(affine[v.c + c]);
    }
    for (int k = 0; k < 3; ++k) widen_column(k);
    args.mean = column(0);
    args.scale = column(1);
    args.bias = column(2);
    args.dz_mean = column(3);
    args.x_slope = column(4);
  }

  A* column(int k) { return params.get() + k * length; }
  void widen_column(int k) {
    for (int64_t j = view.c; j < repeat * view.c; ++j) column(k)[j] = column(k)[j - view.c];
  }

  Backward<T> at(const Backward<T>& from, int64_t c) const {
    Backward<T> a = from;
    a.mean += c;
    a.scale += c;
    a.bias += c;
    a.dz_mean += c;
    a.x_slope += c;
    return a;
  }

  void reduce(Planes tile, int64_t c, double* sum, double* dot) {
    std::fill(sum, sum + tile.channels, 0.0);
    std::fill(dot, dot + tile.channels, 0.0);
    kernels.plane_backward_reduce(at(reduce_args, c), tile, sum, dot);
  }
  void reduce_unit(Rows unit, int64_t tile_rows, double* sum, double* dot) {
    const int64_t padded = ceil_div(unit.width, kPad) * kPad;
    std::fill(sum, sum + padded, 0.0);
    std::fill(dot, dot + padded, 0.0);
    for (int64_t r = 0; r < unit.rows; r += tile_rows)
      kernels.row_backward_reduce(
          reduce_args, {unit.begin + r * unit.width, std::min(tile_rows, unit.rows - r), unit.width}, sum,
          dot);
  }

  void finish(int64_t c, int64_t from, const Partials& partials) {
    double sum = 0, dot = 0;
    partials.for_each(from, [&](int64_t, double s, double d) {
      sum += s;
      dot += d;
    });
    sums.get()[c] = sum;
    sums.get()[view.c + c] = dot;
    const double n = double(view.per_channel()), invstd = statistics[view.c + c];
    column(3)[c] = A(sum / n);
    column(4)[c] = A(invstd * invstd * dot / n);
  }
  void widen(int64_t, int64_t) {
    widen_column(3);
    widen_column(4);
  }

  void apply(Planes tile, int64_t c) { kernels.plane_backward_input(at(args, c), tile); }
  void apply(Rows tile) { kernels.row_backward_input(args, tile); }

  void run(bool reduce, bool do_apply) {
    if (view.rows) {
      run_rows(*this, view, RowTiling(view), reduce, do_apply);
    } else {
      run_planes(*this, view, reduce, do_apply);
    }
  }
};

void check_statistics(const Tensor& statistics, const View& v, ScalarType type) {
  STD_TORCH_CHECK(statistics.dim() == 2 && statistics.size(0) == 2 && statistics.size(1) == v.c &&
                      statistics.scalar_type() == accumulate_type(type) && statistics.is_contiguous() &&
                      statistics.is_cpu(),
                  "batch_norm: statistics must be the (2, C) tensor of the forward pass");
}

Tensor none(ScalarType type) { return empty_strided({0}, {1}, type); }

// Everything a backward op reads, in one layout.
struct Inputs {
  Geometry g;
  ScalarType type;
  Tensor grad_output;
  MaybeTensor input;
  EpilogueTensors epilogue;

  Inputs(const Tensor& grad_output_in, const MaybeTensor& input_in, const Tensor& statistics,
         const MaybeTensor& weight, const MaybeTensor& bias, const MaybeTensor& residual, int64_t activation,
         double slope, const MaybeTensor& key, double p, const MaybeTensor& sign_bits)
      : g(geometry_of(input_in.has_value() ? *input_in : grad_output_in)),
        type(grad_output_in.scalar_type()),
        grad_output(in_layout(grad_output_in, g, "grad_output")),
        epilogue(g, type, residual, activation, slope, key, p) {
    if (input_in.has_value()) {
      STD_TORCH_CHECK(input_in->scalar_type() == type,
                      "batch_norm: grad_output must have the dtype of input");
      input = in_layout(*input_in, g, "input");
    }
    check_statistics(statistics, g.view, type);
    check_channels(weight, g.view.c, "weight");
    check_channels(bias, g.view.c, "bias");
    if (sign_bits.has_value() && sign_bits->numel() > 0) {
      STD_TORCH_CHECK(
          sign_bits->numel() == ceil_div(g.view.numel(), 8) && sign_bits->scalar_type() == ScalarType::Byte,
          "batch_norm: sign_bits must be those of the forward pass");
      epilogue.sign_bits = sign_bits;
    }
  }

  // Whether dz differs from grad_output.
  bool plain() const { return activation_none() && !epilogue.keep_bits.has_value(); }
  bool activation_none() const { return epilogue.activation == kNone; }

  template <class T>
  Backward<T> args(const BackwardJob<T>& job) const {
    Backward<T> a = job.args;
    a.input = data<T>(input);
    a.grad_output = data<T>(grad_output);
    a.epilogue = epilogue.get<T>();
    if (plain()) a.epilogue.residual = nullptr;
    return a;
  }
};

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Gradients batch_norm_backward(const Tensor& grad_output_in, const MaybeTensor& input_in,
                              const Tensor& statistics, const MaybeTensor& weight, const MaybeTensor& bias,
                              bool batch_statistics, bool need_input, bool need_affine, bool need_residual,
                              const MaybeTensor& residual, int64_t activation, double slope,
                              const MaybeTensor& key, double p, const MaybeTensor& sign_bits) {
  const Inputs in(grad_output_in, input_in, statistics, weight, bias, residual, activation, slope, key, p,
                  sign_bits);
  const View& v = in.g.view;
  const ScalarType acc = accumulate_type(in.type);
  const bool reduce = need_affine || (batch_statistics && need_input);
  STD_TORCH_CHECK(
      in.input.has_value() || (!reduce && (in.activation_none() || in.epilogue.sign_bits.has_value())),
      "batch_norm: this backward pass needs input");
  Tensor grad_input = need_input ? empty_as(in.g, in.type) : none(in.type);
  Tensor grad_residual = need_residual ? empty_as(in.g, in.type) : none(in.type);
  Tensor grad_weight =
      need_affine && weight.has_value() ? empty_vector(v.c, weight->scalar_type()) : none(acc);
  Tensor grad_bias = need_affine && bias.has_value() ? empty_vector(v.c, bias->scalar_type()) : none(acc);
  std::vector<double> sums(2 * v.c, 0.0);
  if (v.numel() > 0) {
    with_type(in.type, [&]<class T>(T, const KernelTable<T>& kernels) {
      BackwardJob<T> job(kernels, v, statistics, weight, bias);
      Backward<T> a = in.args<T>(job);
      a.batch_statistics = batch_statistics;
      a.grad_residual = need_residual ? mutable_data<T>(grad_residual) : nullptr;
      job.reduce_args = a;
      if (reduce && need_residual && !in.plain()) {
        // The reduction leaves dz behind, and the second half reads it instead of recomputing it.
        a.grad_output = a.grad_residual;
        a.grad_residual = nullptr;
        a.epilogue = {};
      } else if (reduce) {
        job.reduce_args.grad_residual = nullptr;
      }
      a.grad_input = need_input ? mutable_data<T>(grad_input) : nullptr;
      a.stream = need_input && streams(grad_input);
      if (in.plain() && need_residual) {
        Tensor copy = grad_residual;
        torch::stable::copy_(copy, in.grad_output);
        a.grad_residual = nullptr;
      }
      job.args = a;
      const bool apply = a.grad_input != nullptr || a.grad_residual != nullptr;
      job.run(reduce, apply);
      if (!reduce) return;
      for (int64_t c = 0; c < v.c; ++c) {
        sums[c] = job.sums.get()[c];
        sums[v.c + c] = job.sums.get()[v.c + c] * job.statistics[v.c + c];
      }
    });
  }
  if (grad_bias.numel() > 0) write_channels(grad_bias, v.c, sums.data());
  if (grad_weight.numel() > 0) write_channels(grad_weight, v.c, sums.data() + v.c);
  return {grad_input, grad_weight, grad_bias, grad_residual};
}

Tensor batch_norm_backward_reduce(const Tensor& grad_output_in, const Tensor& input_in,
                                  const Tensor& statistics, const MaybeTensor& weight,
                                  const MaybeTensor& bias, const MaybeTensor& residual, int64_t activation,
                                  double slope, const MaybeTensor& key, double p,
                                  const MaybeTensor& sign_bits) {
  const Inputs in(grad_output_in, input_in, statistics, weight, bias, residual, activation, slope, key, p,
                  sign_bits);
  const View& v = in.g.view;
  Tensor out = empty_strided({2, v.c}, {v.c, 1}, accumulate_type(in.type));
  with_type(in.type, [&]<class T>(T, const KernelTable<T>& kernels) {
    using A = acc_t<T>;
    A* to = mutable_data<A>(out);
    std::fill(to, to + 2 * v.c, A(0));
    if (v.numel() == 0) return;
    BackwardJob<T> job(kernels, v, statistics, weight, bias);
    job.reduce_args = in.args<T>(job);
    job.run(true, false);
    for (int64_t c = 0; c < v.c; ++c) {
      to[c] = A(job.sums.get()[c]);
      to[v.c + c] = A(job.sums.get()[v.c + c] * job.statistics[v.c + c]);
    }
  });
  return out;
}

std::tuple<Tensor, Tensor> batch_norm_backward_input(const Tensor& grad_output_in, const Tensor& input_in,
                                                     const Tensor& statistics, const Tensor& means,
                                                     const MaybeTensor& weight, const MaybeTensor& bias,
                                                     bool need_residual, const MaybeTensor& residual,
                                                     int64_t activation, double slope, const MaybeTensor& key,
                                                     double p, const MaybeTensor& sign_bits) {
  const Inputs in(grad_output_in, input_in, statistics, weight, bias, residual, activation, slope, key, p,
                  sign_bits);
  const View& v = in.g.view;
  check_statistics(means, v, in.type);
  Tensor grad_input = empty_as(in.g, in.type);
  Tensor grad_residual = need_residual ? empty_as(in.g, in.type) : none(in.type);
  with_type(in.type, [&]<class T>(T, const KernelTable<T>& kernels) {
    using A = acc_t<T>;
    if (v.numel() == 0) return;
    BackwardJob<T> job(kernels, v, statistics, weight, bias);
    Backward<T> a = in.args<T>(job);
    a.batch_statistics = true;
    a.grad_input = mutable_data<T>(grad_input);
    a.stream = streams(grad_input);
    if (need_residual && in.plain()) {
      Tensor copy = grad_residual;
      torch::stable::copy_(copy, in.grad_output);
    } else if (need_residual) {
      a.grad_residual = mutable_data<T>(grad_residual);
    }
    job.args = a;
    const A* from = data<A>(means);
    for (int64_t c = 0; c < v.c; ++c) {
      job.column(3)[c] = from[c];
      job.column(4)[c] = from[v.c + c] * job.statistics[v.c + c];
    }
    job.widen(v.c, 1);
    job.run(false, true);
  });
  return {grad_input, grad_residual};
}

}  // namespace
}  // namespace modeprobe::cpu

STABLE_TORCH_LIBRARY_IMPL(modeprobe, CPU, m) {
  m.impl("batch_norm_backward", TORCH_BOX(&modeprobe::cpu::batch_norm_backward));
  m.impl("batch_norm_backward_reduce", TORCH_BOX(&modeprobe::cpu::batch_norm_backward_reduce));
  m.impl("batch_norm_backward_input", TORCH_BOX(&modeprobe::cpu::batch_norm_backward_input));
}
