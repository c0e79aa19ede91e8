// lift_fast._C: every op of csrc/ for Python. Tensors come in as addresses, so that one build serves every torch.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "build_info.h"  // written by setup.py: LIFT_FAST_CUDA, LIFT_FAST_CUDA_ARCHS, LIFT_FAST_CUDA_REASON
#include "ops.h"

namespace py = pybind11;
void bind_pairs(py::module_& module);       // bind_pairs.cpp
void bind_pairs_cuda(py::module_& module);  // bind_pairs_cuda.cpp

using namespace lift_fast;

namespace {

template <typename T>
T* at(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

Dequant dequant_job(std::uintptr_t codes, std::uintptr_t scales, std::uintptr_t rows, std::uintptr_t out,
                    int64_t n, int64_t m, int64_t dim, int64_t codes_stride, int64_t scales_stride, int type) {
  if (type < 0 || type > 2) throw std::invalid_argument("type must be 0 (float32), 1 (bfloat16) or 2 (float16)");
  return {at<const int8_t>(codes), at<const float>(scales), at<const int64_t>(rows), at<void>(out), n, m, dim,
          codes_stride, scales_stride, static_cast<Out>(type)};
}

const char* name(Isa isa) {
  return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "scalar";
}

Isa isa_named(const std::string& wanted) {
  if (wanted.empty()) return best_isa();
  for (int i = 0; i <= static_cast<int>(best_isa()); ++i)
    if (wanted == name(static_cast<Isa>(i))) return static_cast<Isa>(i);
  throw std::invalid_argument("this CPU has no '" + wanted + "'; its best is " + name(best_isa()));
}

void dequant_on_cpu(std::uintptr_t codes, std::uintptr_t scales, std::uintptr_t rows, std::uintptr_t out,
                    int64_t n, int64_t m, int64_t dim, int64_t codes_stride, int64_t scales_stride, int type,
                    int threads, const std::string& isa) {
  const Dequant job = dequant_job(codes, scales, rows, out, n, m, dim, codes_stride, scales_stride, type);
  const Isa chosen = isa_named(isa);
  int64_t bad = -1;
  {
    py::gil_scoped_release release;
    bad = first_row_outside(job);
    if (bad < 0) dequant_cpu(job, threads, chosen);
  }
  if (bad >= 0)
    throw py::index_error("rows[" + std::to_string(bad) + "] is " + std::to_string(job.rows[bad]) +
                          ", outside a table of " + std::to_string(n) + " rows");
}

#if LIFT_FAST_CUDA
void dequant_on_cuda(std::uintptr_t codes, std::uintptr_t scales, std::uintptr_t rows, std::uintptr_t out,
                     int64_t n, int64_t m, int64_t dim, int64_t codes_stride, int64_t scales_stride, int type,
                     int device, std::uintptr_t stream) {
  const Dequant job = dequant_job(codes, scales, rows, out, n, m, dim, codes_stride, scales_stride, type);
  const char* error = nullptr;
  {
    py::gil_scoped_release release;
    error = dequant_cuda(job, device, stream);
  }
  if (error) throw std::runtime_error(std::string("dequant on the GPU: ") + error);
}
#endif

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Compiled ops of lift_fast. Pointers are integers; see csrc/ops.h for shapes.";
  module.def("build_info", [] {
    py::dict info;
    info["cuda"] = static_cast<bool>(LIFT_FAST_CUDA);
    info["archs"] = LIFT_FAST_CUDA_ARCHS;
    info["reason"] = LIFT_FAST_CUDA_REASON;
    return info;
  }, "What this build holds: cuda (bool), archs (\"80;90a\"), reason (one line, why there is CUDA or not).");
  module.def("isa_levels", [] {
    py::list levels;
    for (int i = 0; i <= static_cast<int>(best_isa()); ++i) levels.append(name(static_cast<Isa>(i)));
    return levels;
  }, "Instruction sets this CPU has, slowest first.");
  module.def("dequant_cpu", &dequant_on_cpu, py::arg("codes"), py::arg("scales"), py::arg("rows"), py::arg("out"),
             py::arg("n"), py::arg("m"), py::arg("dim"), py::arg("codes_stride"), py::arg("scales_stride"),
             py::arg("type"), py::arg("threads"), py::arg("isa") = "");
  bind_pairs(module);
  bind_pairs_cuda(module);
#if LIFT_FAST_CUDA
  module.def("dequant_cuda", &dequant_on_cuda, py::arg("codes"), py::arg("scales"), py::arg("rows"),
             py::arg("out"), py::arg("n"), py::arg("m"), py::arg("dim"), py::arg("codes_stride"),
             py::arg("scales_stride"), py::arg("type"), py::arg("device"), py::arg("stream"));
  module.def("cuda_device_count", &cuda_device_count);
#endif
}
