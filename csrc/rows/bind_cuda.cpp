// Gathering and dequantizing rows on the GPU, for Python; dequant.h has the shapes.
#include <pybind11/pybind11.h>

#include <stdexcept>

#include "build_info.h"  // written by setup.py: LIFT_FAST_CUDA
#include "common/bind.h"
#include "dequant.h"

namespace py = pybind11;

#if LIFT_FAST_CUDA
namespace lift_fast {
namespace {

void dequant(Address codes, Address scales, Address rows, Address out, int64_t n, int64_t m, int64_t dim,
             int64_t codes_stride, int64_t scales_stride, int codec, int type, bool normalize, int device,
             Address stream) {
  if (codec < 0 || codec > 5) throw std::invalid_argument("codec must be a number of lift_fast/ops/rows/codecs.py");
  const auto kind = static_cast<Codec>(codec);
  if (type < 0 || type > 3 || (type == 3 && (!is_integer(kind) || normalize)))
    throw std::invalid_argument("type must be 0 (float32), 1 (bfloat16), 2 (float16) or, of integers, 3 (int8)");
  const Dequant job{at<const void>(codes), at<const float>(scales), at<const int64_t>(rows), at<void>(out), n, m, dim,
                    codes_stride, scales_stride, kind, static_cast<Element>(type), normalize};
  run_on_gpu("dequant", [&] { return dequant_cuda(job, device, stream); });
}

// int8 codes as floats, without scales: the text features of the pair losses.
void widen(Address codes, int64_t stride, int64_t rows, int64_t dim, Address out, int type, int device,
           Address stream) {
  const Dequant job{at<const void>(codes), nullptr, nullptr, at<void>(out), rows, rows, dim, stride, 0, Codec::int8,
                    float_type(type), false};
  run_on_gpu("widening", [&] { return dequant_cuda(job, device, stream); });
}

}  // namespace
}  // namespace lift_fast
#endif

void bind_rows_cuda(py::module_& module) {
#if LIFT_FAST_CUDA
  using namespace lift_fast;
  using namespace py::literals;
  module.def("dequant_cuda", &dequant, "codes"_a, "scales"_a, "rows"_a, "out"_a, "n"_a, "m"_a, "dim"_a,
             "codes_stride"_a, "scales_stride"_a, "codec"_a, "type"_a, "normalize"_a, "device"_a, "stream"_a);
  module.def("widen_cuda", &widen, "codes"_a, "stride"_a, "rows"_a, "dim"_a, "out"_a, "type"_a, "device"_a,
             "stream"_a);
#else
  (void)module;
#endif
}
