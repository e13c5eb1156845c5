// Every operator of modeprobe, by schema. Implementations register themselves per backend in cpu/ and cuda/.
#include <Python.h>
#include <torch/csrc/stable/library.h>

// torch.ops does the work; importing the module only loads this library.
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C(void) {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}

STABLE_TORCH_LIBRARY(modeprobe, m) {
  // Which vector instructions the CPU kernels use: "avx512", "avx2" or "portable".
  m.def("cpu_capability() -> str");

  // Dropout under the mask contract (mask.cuh): y = keep(offset + i) ? scale * x : +0.
  //
  // key: int64 (2), read as uint64 (seed, stream), on the data's device. p_tensor: float64, one element, on
  // the data's device; where given it is used instead of p, is never read by the host of a CUDA op, and is
  // clamped to [0, 1] there (the CPU, which waits for nobody, raises). scale = 1 / (1 - p) computed in
  // float64 and rounded to acc, or 1 where !scaled; p = 1 drops everything. acc is float64 for float64 data,
  // else float32; results are rounded once. Dense, non-overlapping input (any order of strides): i counts in
  // memory order, the output has the input's strides. Any other input counts as, and yields, a contiguous
  // one. offset: int64, read as uint64.
  m.def(
      "dropout(Tensor input, Tensor key, float p, int offset=0, bool scaled=True, Tensor? p_tensor=None) "
      "-> Tensor");
  m.def(
      "dropout_(Tensor(a!) input, Tensor key, float p, int offset=0, bool scaled=True, "
      "Tensor? p_tensor=None) -> ()");
  // The decisions keep(offset + i), i < numel, as a bool tensor (numel).
  m.def("dropout_mask(Tensor key, int numel, float p, int offset=0, Tensor? p_tensor=None) -> Tensor");
  // A key that depends on key and on n (n_tensor: int64, one element, where given) and on nothing else:
  // its four words are philox(seed, {stream_lo, stream_hi, n_lo, n_hi & 0x3fffffff | 1 << 30}), seed first.
  m.def("fold_in(Tensor key, int n, Tensor? n_tensor=None) -> Tensor");

  // One decision for all elements that differ only in shared_dims (ascending, in [0, input.dim())): the mask
  // has input's shape with 1 in these dimensions, and i is the row-major position in it, whatever the strides
  // of input. shared_dims = [2, 3] of (N, C, H, W) is Dropout2d. A dropped element is not read.
  m.def(
      "structured_dropout(Tensor input, Tensor key, float p, int[] shared_dims, int offset=0, "
      "bool scaled=True, Tensor? p_tensor=None) -> Tensor");
  // y = keep ? a * x + b : a * alpha' + b, alpha' = -1.7580993408473766, a = ((1 - p) (1 + p alpha'^2))^-1/2,
  // b = -a * alpha' * p (Klambauer et al. 2017), a, b and the fill in float64 rounded to acc; p = 1 gives +0.
  // linear: b = fill = 0, which is the derivative. An empty shared_dims: a mask of input's size, as in
  // dropout.
  m.def(
      "alpha_dropout(Tensor input, Tensor key, float p, int[] shared_dims, bool linear=False, int offset=0, "
      "Tensor? p_tensor=None) -> Tensor");

  // residual + dropout(input + bias): one rounding, at the end. All of one dtype; residual has input's shape,
  // bias is (input.size(-1)) or None. i is the row-major position; contiguous inputs (others are made so).
  m.def(
      "bias_dropout_add(Tensor input, Tensor? bias, Tensor residual, Tensor key, float p, int offset=0, "
      "Tensor? p_tensor=None) -> Tensor");
  // grad_input = dropout(grad_output), grad_bias = its sum (in acc, fixed order) over all but the last dim.
  m.def(
      "bias_dropout_add_backward(Tensor grad_output, Tensor key, float p, int offset=0, "
      "Tensor? p_tensor=None) -> (Tensor grad_input, Tensor grad_bias)");

  // dropout(softmax(scores + mask, -1)): i is the row-major position in scores. mask: None, bool (False takes
  // no part) or of scores' dtype (added); scores.dim() dimensions, each of scores' size or 1, any strides.
  // A row in which nothing takes part (all -inf) gives zeros. probabilities: before dropout, in scores'
  // dtype, contiguous, or empty (0) unless save.
  m.def(
      "softmax_dropout(Tensor scores, Tensor? mask, Tensor key, float p, bool save, int offset=0, "
      "Tensor? p_tensor=None) -> (Tensor output, Tensor probabilities)");
  // P * (d - sum(d * P, -1)), d = dropout(grad_output).
  m.def(
      "softmax_dropout_backward(Tensor grad_output, Tensor probabilities, Tensor key, float p, int offset=0, "
      "Tensor? p_tensor=None) -> Tensor");

  // Batch normalisation: z = weight * (x - mean) * invstd + bias, y = dropout(activation(z + residual)).
  //
  // Shapes: input (N, C, *). Per-channel arguments have shape (C). residual has input's shape and dtype.
  // acc is float64 for float64 input, else float32; weight and bias are acc or of input's dtype (both the
  // same), running buffers are acc or of input's dtype. Outputs that are not wanted are empty tensors.
  // statistics: acc (2, C), rows mean and invstd = 1 / sqrt(biased variance + eps).
  // activation: 0 none, 1 relu, 2 leaky_relu with `slope`, 3 silu, 4 gelu (erf), 5 gelu (tanh).
  // key, p: dropout under the mask contract, indexed in output's memory order; key None means none.
  // sign_bits: uint8 (ceil(numel / 8)); bit i & 7 of byte i >> 3 says z + residual > 0 at position i of
  //   input's memory order. It is wanted where relu or leaky_relu follows a residual.
  // output and grad_input have input's strides where input is contiguous or has its channels innermost
  // (channels_last); any other input counts as, and yields, a contiguous one. grad_output: any strides.

  // Normalises with the batch's statistics and folds them into the running buffers where given:
  //   num_batches_tracked += 1; f = momentum, or 1 / num_batches_tracked where momentum is None;
  //   running = (1 - f) * running + f * batch (variance unbiased, n / (n - 1)); f == 1 assigns.
  // With skipped_batches given, statistics with a non-finite mean or variance in any channel leave all
  // buffers and num_batches_tracked alone and count there instead. n = 0 only counts the batch.
  m.def(
      "batch_norm_train(Tensor input, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, Tensor(d!)? skipped_batches, "
      "float? momentum, float eps, Tensor? residual=None, int activation=0, float slope=0.01, "
      "Tensor? key=None, float p=0.0, bool save_sign_bits=False) "
      "-> (Tensor output, Tensor statistics, Tensor sign_bits)");
  // Normalises with given statistics. save: whether `statistics` is wanted.
  m.def(
      "batch_norm_eval(Tensor input, Tensor mean, Tensor variance, Tensor? weight, Tensor? bias, float eps, "
      "Tensor? residual=None, int activation=0, float slope=0.01, Tensor? key=None, float p=0.0, "
      "bool save=False, bool save_sign_bits=False) -> (Tensor output, Tensor statistics, Tensor sign_bits)");
  // batch_statistics: the forward was batch_norm_train (else batch_norm_eval). input may be None where only
  // grad_input of an evaluation without activation is wanted. bias and residual are read only to recompute
  // z + residual; sign_bits spares that. grad_residual is the gradient of z.
  m.def(
      "batch_norm_backward(Tensor grad_output, Tensor? input, Tensor statistics, Tensor? weight, Tensor? "
      "bias, "
      "bool batch_statistics, bool need_input, bool need_affine, bool need_residual, Tensor? residual=None, "
      "int activation=0, float slope=0.01, Tensor? key=None, float p=0.0, Tensor? sign_bits=None) "
      "-> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias, Tensor grad_residual)");

  // The pieces, for statistics shared between processes and for recalibration.
  // moments: acc (2 * C + 2), (mean, M2, n mod 2^24, n div 2^24), M2 = sum((x - mean)^2); n = 0 gives zeros.
  m.def("batch_norm_moments(Tensor input) -> Tensor");
  // The same in float64 for any input: pooling many batches keeps the digits that a float32 mean has lost.
  m.def("batch_norm_moments_double(Tensor input) -> Tensor");
  // moments (K, 2 * C + 2) merged in order; buffers as in batch_norm_train. variance is biased; count (1).
  m.def(
      "batch_norm_merge(Tensor moments, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
      "Tensor(c!)? num_batches_tracked, Tensor(d!)? skipped_batches, float? momentum) "
      "-> (Tensor mean, Tensor variance, Tensor count)");
  // sums: acc (2, C), rows sum(dz) and sum(dz * (x - mean) * invstd) = grad_bias and grad_weight.
  m.def(
      "batch_norm_backward_reduce(Tensor grad_output, Tensor input, Tensor statistics, Tensor? weight, "
      "Tensor? bias, Tensor? residual=None, int activation=0, float slope=0.01, Tensor? key=None, "
      "float p=0.0, Tensor? sign_bits=None) -> Tensor sums");
  // means: acc (2, C), the sums divided by the count:
  //   grad_input = weight * invstd * (dz - means[0] - (x - mean) * invstd * means[1]).
  m.def(
      "batch_norm_backward_input(Tensor grad_output, Tensor input, Tensor statistics, Tensor means, "
      "Tensor? weight, Tensor? bias, bool need_residual, Tensor? residual=None, int activation=0, "
      "float slope=0.01, Tensor? key=None, float p=0.0, Tensor? sign_bits=None) "
      "-> (Tensor grad_input, Tensor grad_residual)");
}
