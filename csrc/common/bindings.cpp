// lift_fast._C: every op of csrc/ for Python. Tensors are passed as addresses, so that one build serves every torch.
#include <pybind11/pybind11.h>

#include "bind.h"
#include "build_info.h"  // written by setup.py: LIFT_FAST_CUDA, LIFT_FAST_CUDA_ARCHS, LIFT_FAST_CUDA_REASON
#include "device.h"
#include "scratch.h"

namespace py = pybind11;
// A family's functions, in its bind.cpp and its bind_cuda.cpp.
void bind_attention(py::module_& module);
void bind_pairs(py::module_& module);
void bind_pairs_cuda(py::module_& module);
void bind_rows(py::module_& module);
void bind_rows_cuda(py::module_& module);
void bind_transformer(py::module_& module);
void bind_transformer_cuda(py::module_& module);

PYBIND11_MODULE(_C, module) {
  using namespace lift_fast;
  using namespace py::literals;
  module.doc() = "Compiled ops of lift_fast. Pointers are integers; shapes are in the headers of csrc/.";
  module.def("build_info", [] {
    py::dict info;
    info["cuda"] = static_cast<bool>(LIFT_FAST_CUDA);
    info["archs"] = LIFT_FAST_CUDA_ARCHS;
    info["reason"] = LIFT_FAST_CUDA_REASON;
    return info;
  }, "What this build holds: cuda (bool), archs (\"80;90a\"), reason (one line: why it has CUDA or why not).");
#if LIFT_FAST_CUDA
  module.def("cuda_device_count", &cuda_device_count);
#endif
  py::class_<Scratch>(module, "Scratch", py::buffer_protocol())
      .def(py::init<int64_t>(), "bytes"_a)
      .def_buffer([](Scratch& scratch) {
        return py::buffer_info(scratch.get(), sizeof(float), py::format_descriptor<float>::format(), 1,
                               {scratch.bytes() / static_cast<int64_t>(sizeof(float))}, {sizeof(float)});
      });
  module.def("release_scratch", &release_scratch);
  bind_attention(module);
  bind_pairs(module);
  bind_pairs_cuda(module);
  bind_rows(module);
  bind_rows_cuda(module);
  bind_transformer(module);
  bind_transformer_cuda(module);
}
