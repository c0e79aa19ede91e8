// lift_fast._C: every op of csrc/ for Python. Tensors come in as addresses, so that one build serves every torch.
#include <pybind11/pybind11.h>

#include "build_info.h"  // written by setup.py: LIFT_FAST_CUDA, LIFT_FAST_CUDA_ARCHS, LIFT_FAST_CUDA_REASON

namespace py = pybind11;
void bind_attention(py::module_& module);     // bind_attention.cpp
void bind_blocks(py::module_& module);        // bind_blocks.cpp
void bind_blocks_cuda(py::module_& module);   // bind_blocks_cuda.cpp
void bind_cache(py::module_& module);         // bind_cache.cpp
void bind_dequant_cuda(py::module_& module);  // bind_dequant_cuda.cpp
void bind_pairs(py::module_& module);         // bind_pairs.cpp
void bind_pairs_cuda(py::module_& module);    // bind_pairs_cuda.cpp

PYBIND11_MODULE(_C, module) {
  module.doc() = "Compiled ops of lift_fast. Pointers are integers; see csrc/rows/dequant.h for shapes.";
  module.def("build_info", [] {
    py::dict info;
    info["cuda"] = static_cast<bool>(LIFT_FAST_CUDA);
    info["archs"] = LIFT_FAST_CUDA_ARCHS;
    info["reason"] = LIFT_FAST_CUDA_REASON;
    return info;
  }, "What this build holds: cuda (bool), archs (\"80;90a\"), reason (one line, why there is CUDA or not).");
  bind_attention(module);
  bind_blocks(module);
  bind_blocks_cuda(module);
  bind_cache(module);
  bind_dequant_cuda(module);
  bind_pairs(module);
  bind_pairs_cuda(module);
}
