// Gather and widen on the GPU for Python; addresses are integers, see csrc/rows/dequant.h for shapes.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "build_info.h"  // written by setup.py: LIFT_FAST_CUDA
#include "rows/dequant.h"

namespace py = pybind11;

#if LIFT_FAST_CUDA
namespace lift_fast {
namespace {

template <typename T>
T* at(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void dequant(std::uintptr_t codes, std::uintptr_t scales, std::uintptr_t rows, std::uintptr_t out, int64_t n,
             int64_t m, int64_t dim, int64_t codes_stride, int64_t scales_stride, int codec, int type, bool normalize,
             int device, std::uintptr_t stream) {
  if (codec < 0 || codec > 5) throw std::invalid_argument("codec must be a number of lift_fast/codecs.py");
  const bool integer = codec == 2 || codec > 3;
  if (type < 0 || type > 3 || (type == 3 && (!integer || normalize)))
    throw std::invalid_argument("type must be 0 (float32), 1 (bfloat16), 2 (float16) or, of integers, 3 (int8)");
  const Dequant job{at<const void>(codes), at<const float>(scales), at<const int64_t>(rows), at<void>(out), n, m, dim,
                    codes_stride, scales_stride, static_cast<Codec>(codec), static_cast<Out>(type), normalize};
  const char* error = nullptr;
  {
    py::gil_scoped_release release;
    error = dequant_cuda(job, device, stream);
  }
  if (error) throw std::runtime_error(std::string("dequant on the GPU: ") + error);
}

}  // namespace
}  // namespace lift_fast
#endif

void bind_dequant_cuda(py::module_& module) {
#if LIFT_FAST_CUDA
  using namespace lift_fast;
  using py::arg;
  module.def("dequant_cuda", &dequant, arg("codes"), arg("scales"), arg("rows"), arg("out"), arg("n"), arg("m"),
             arg("dim"), arg("codes_stride"), arg("scales_stride"), arg("codec"), arg("type"), arg("normalize"),
             arg("device"), arg("stream"));
  module.def("cuda_device_count", &cuda_device_count);
#else
  (void)module;
#endif
}
