// Python's view of the emulated kernels; tensors come as addresses.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "kernels.h"
#include "machine_kernels.h"
#include "scheduler.h"

namespace py = pybind11;
using namespace emulated;

namespace {

template <typename T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

template <typename T>
void pointer(py::class_<BatchNorm>& layer, const char* name, T* BatchNorm::* member) {
  layer.def_property(
      name, [member](const BatchNorm& self) { return reinterpret_cast<uintptr_t>(self.*member); },
      [member](BatchNorm& self, uintptr_t address) { self.*member = at<T>(address); });
}

}  // namespace

PYBIND11_MODULE(modeprobe_emulator, m) {
  py::register_exception<emulator::Fault>(m, "Fault", PyExc_RuntimeError);
  m.def("configure", [](uint64_t seed, int multiprocessors, int resident_blocks) {
    emulator::settings() = {seed, multiprocessors, resident_blocks};
  });
  m.def("dropout", [](int dtype, uintptr_t x, uintptr_t y, int64_t n, uintptr_t key, uint64_t offset,
                      double p, uintptr_t p_on_device, bool scaled) {
    dropout(Dtype(dtype), at<void>(x), at<void>(y), n, at<int64_t>(key), offset,
            {p, at<void>(p_on_device), scaled});
  });
  m.def("dropout_mask",
        [](uintptr_t mask, int64_t n, uintptr_t key, uint64_t offset, double p, uintptr_t p_on_device) {
          dropout_mask(at<uint8_t>(mask), n, at<int64_t>(key), offset, {p, at<void>(p_on_device)});
        });
  m.def("fold_in",
        [](uintptr_t out, uintptr_t key, uint64_t n) { fold_in(at<int64_t>(out), at<int64_t>(key), n); });

  using Sizes = std::vector<int64_t>;
  m.def("structured_dropout", [](int dtype, uintptr_t x, uintptr_t y, int64_t n, const Sizes& size,
                                 const Sizes& step, uintptr_t key, uint64_t offset, double p,
                                 uintptr_t p_on_device, bool scaled, bool alpha, bool linear) {
    structured_dropout(Dtype(dtype), at<void>(x), at<void>(y), n, int(size.size()), size.data(), step.data(),
                       at<int64_t>(key), offset, {p, at<void>(p_on_device), scaled}, alpha, linear);
  });
  m.def("bias_dropout_add", [](int dtype, uintptr_t x, uintptr_t bias, uintptr_t residual, uintptr_t y,
                               int64_t n, int64_t columns, uintptr_t key, uint64_t offset, double p) {
    bias_dropout_add(Dtype(dtype), at<void>(x), at<void>(bias), at<void>(residual), at<void>(y), n, columns,
                     at<int64_t>(key), offset, {p});
  });
  m.def("bias_dropout_add_backward", [](int dtype, uintptr_t dy, uintptr_t dx, uintptr_t d_bias, int64_t rows,
                                        int64_t columns, uintptr_t key, uint64_t offset, double p) {
    bias_dropout_add_backward(Dtype(dtype), at<void>(dy), at<void>(dx), at<void>(d_bias), rows, columns,
                              at<int64_t>(key), offset, {p});
  });
  m.def("softmax_dropout", [](int dtype, uintptr_t scores, uintptr_t mask, bool is_bool, const Sizes& size,
                              const Sizes& step, int64_t inner_step, uintptr_t y, uintptr_t probabilities,
                              int64_t rows, int64_t length, uintptr_t key, uint64_t offset, double p) {
    softmax_dropout(Dtype(dtype), at<void>(scores), at<void>(mask), is_bool, int(size.size()), size.data(),
                    step.data(), inner_step, at<void>(y), at<void>(probabilities), rows, length,
                    at<int64_t>(key), offset, {p});
  });
  m.def("softmax_dropout_backward",
        [](int dtype, uintptr_t dy, uintptr_t probabilities, uintptr_t ds, int64_t rows, int64_t length,
           uintptr_t key, uint64_t offset, double p) {
          softmax_dropout_backward(Dtype(dtype), at<void>(dy), at<void>(probabilities), at<void>(ds), rows,
                                   length, at<int64_t>(key), offset, {p});
        });

  py::class_<BatchNorm> layer(m, "BatchNorm");
  layer.def(py::init([](int64_t n, int64_t c, int64_t s, bool channels_last) {
    BatchNorm made{};
    made.n = n, made.c = c, made.s = s, made.channels_last = channels_last;
    return made;
  }));
  layer.def_readwrite("wide_parameters", &BatchNorm::wide_parameters)
      .def_readwrite("wide_buffers", &BatchNorm::wide_buffers)
      .def_readwrite("eps", &BatchNorm::eps)
      .def_readwrite("has_momentum", &BatchNorm::has_momentum)
      .def_readwrite("momentum", &BatchNorm::momentum)
      .def_readwrite("activation", &BatchNorm::activation)
      .def_readwrite("slope", &BatchNorm::slope)
      .def_readwrite("p", &BatchNorm::p)
      .def_readwrite("on_chip", &BatchNorm::on_chip);
  pointer(layer, "weight", &BatchNorm::weight);
  pointer(layer, "bias", &BatchNorm::bias);
  pointer(layer, "running_mean", &BatchNorm::running_mean);
  pointer(layer, "running_var", &BatchNorm::running_var);
  pointer(layer, "batches", &BatchNorm::batches);
  pointer(layer, "skipped", &BatchNorm::skipped);
  pointer(layer, "residual", &BatchNorm::residual);
  pointer(layer, "key", &BatchNorm::key);
  pointer(layer, "sign_bits", &BatchNorm::sign_bits);
  m.def("on_chip_shape", &on_chip_shape);
  m.def("batch_norm_train",
        [](int dtype, const BatchNorm& layer, uintptr_t x, uintptr_t y, uintptr_t statistics) {
          batch_norm_train(Dtype(dtype), layer, at<void>(x), at<void>(y), at<void>(statistics));
        });
  m.def("batch_norm_eval",
        [](int dtype, const BatchNorm& layer, uintptr_t x, uintptr_t y, uintptr_t statistics) {
          batch_norm_eval(Dtype(dtype), layer, at<void>(x), at<void>(y), at<void>(statistics));
        });
  m.def("batch_norm_backward", [](int dtype, const BatchNorm& layer, bool batch_statistics, uintptr_t dy,
                                  uintptr_t x, uintptr_t statistics, uintptr_t sums, uintptr_t dx,
                                  uintptr_t d_residual, uintptr_t d_weight, uintptr_t d_bias) {
    batch_norm_backward(Dtype(dtype), layer, batch_statistics, at<void>(dy), at<void>(x),
                        at<void>(statistics), at<void>(sums), at<void>(dx), at<void>(d_residual),
                        at<void>(d_weight), at<void>(d_bias));
  });
  m.def("batch_norm_moments", [](int dtype, const BatchNorm& layer, uintptr_t x, uintptr_t packed) {
    batch_norm_moments(Dtype(dtype), layer, at<void>(x), at<void>(packed));
  });
  m.def("batch_norm_merge", [](int dtype, const BatchNorm& layer, uintptr_t parts, int64_t part_count,
                               uintptr_t mean, uintptr_t variance, uintptr_t count) {
    batch_norm_merge(Dtype(dtype), layer, at<void>(parts), part_count, at<void>(mean), at<void>(variance),
                     at<void>(count));
  });
  m.def("run_machine_kernel", [](const std::string& name, uintptr_t x, uintptr_t out, unsigned blocks,
                                 unsigned threads, bool cooperative) {
    run_machine_kernel(name, at<float>(x), at<float>(out), blocks, threads, cooperative);
  });
}
