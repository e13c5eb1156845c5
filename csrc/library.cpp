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

  m.def("dropout(Tensor input, Tensor key, float p, int offset=0) -> Tensor");
  m.def("dropout_(Tensor(a!) input, Tensor key, float p, int offset=0) -> ()");
  m.def("dropout_mask(Tensor key, int numel, float p, int offset=0) -> Tensor");
}
