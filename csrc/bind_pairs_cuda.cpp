// The GPU epilogues of the pair losses for Python, and the widening of int8 text; addresses are integers.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "build_info.h"  // written by setup.py: LIFT_FAST_CUDA
#include "ops.h"
#if LIFT_FAST_CUDA
#include "pairs_cuda.h"
#endif

namespace py = pybind11;

#if LIFT_FAST_CUDA
namespace lift_fast {
namespace {

using Address = std::uintptr_t;

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

gpu::Scores scores(Address products, int64_t stride, int64_t rows, int64_t cols, Address a, Address q, Address scale,
                   Address bias, int64_t offset) {
  return {at<const float>(products), stride, rows, cols, at<const float>(a), at<const float>(q),
          at<const float>(scale), at<const float>(bias), offset};
}

Out out_type(int type) {
  if (type < 0 || type > 2) throw std::invalid_argument("type must be 0 (float32), 1 (bfloat16) or 2 (float16)");
  return static_cast<Out>(type);
}

template <typename Launch>
void run(const char* what, Launch launch) {
  const char* error = nullptr;
  {
    py::gil_scoped_release release;
    error = launch();
  }
  if (error) throw std::runtime_error(std::string(what) + " on the GPU: " + error);
}

void contrastive_stats(Address products, int64_t stride, int64_t rows, int64_t cols, Address a, Address q,
                       Address scale, Address bias, int64_t offset, Address row, int64_t row_stride, Address col,
                       int64_t col_stride, Address own, Address scratch, int device, Address stream) {
  const gpu::Scores of = scores(products, stride, rows, cols, a, q, scale, bias, offset);
  const gpu::Stats to{at<float>(row), row_stride, at<float>(col), col_stride, at<float>(own), at<float>(scratch)};
  run("contrastive statistics", [&] { return gpu::contrastive_stats(of, to, device, stream); });
}

void contrastive_gradient(Address products, int64_t stride, int64_t rows, int64_t cols, Address a, Address q,
                          Address scale, Address bias, int64_t offset, Address row, int64_t row_stride, Address col,
                          int64_t col_stride, float row_weight, float col_weight, Address own_g, Address out,
                          int64_t out_stride, int type, Address left, Address right, float factor, bool scaled,
                          int device, Address stream) {
  const gpu::Scores of = scores(products, stride, rows, cols, a, q, scale, bias, offset);
  const gpu::Softmax softmax{at<const float>(row), row_stride, at<const float>(col), col_stride, row_weight, col_weight,
                             at<const float>(own_g)};
  const gpu::Gradient to{at<void>(out), out_stride, out_type(type), at<const float>(left), at<const float>(right),
                         factor, scaled};
  run("contrastive gradient", [&] { return gpu::contrastive_gradient(of, softmax, to, device, stream); });
}

void sigmoid(Address products, int64_t stride, int64_t rows, int64_t cols, Address a, Address q, Address scale,
             Address bias, int64_t offset, float alpha, Address loss, Address d_scale, Address d_bias, Address scratch,
             Address out, int64_t out_stride, int type, Address left, Address right, float factor, bool scaled,
             int device, Address stream) {
  const gpu::Scores of = scores(products, stride, rows, cols, a, q, scale, bias, offset);
  const gpu::Sigmoid sums{alpha, at<float>(loss), at<float>(d_scale), at<float>(d_bias), at<float>(scratch)};
  const gpu::Gradient to{at<void>(out), out_stride, out_type(type), at<const float>(left), at<const float>(right),
                         factor, scaled};
  run("sigmoid loss", [&] { return gpu::sigmoid(of, sums, to, device, stream); });
}

void widen(Address codes, int64_t stride, int64_t rows, int64_t dim, Address out, int type, int device,
           Address stream) {
  const Dequant job{at<const void>(codes), nullptr, nullptr, at<void>(out), rows, rows, dim, stride, 0, Codec::int8,
                    out_type(type), false};
  run("widening", [&] { return dequant_cuda(job, device, stream); });
}

}  // namespace
}  // namespace lift_fast
#endif

void bind_pairs_cuda(py::module_& module) {
#if LIFT_FAST_CUDA
  using namespace lift_fast;
  using py::arg;
  module.def("contrastive_stats_scratch", &gpu::stats_scratch, arg("rows"), arg("cols"));
  module.def("sigmoid_scratch", &gpu::sigmoid_scratch, arg("rows"), arg("cols"));
  module.def("contrastive_stats_cuda", &contrastive_stats, arg("products"), arg("stride"), arg("rows"), arg("cols"),
             arg("a"), arg("q"), arg("scale"), arg("bias"), arg("offset"), arg("row"), arg("row_stride"), arg("col"),
             arg("col_stride"), arg("own"), arg("scratch"), arg("device"), arg("stream"));
  module.def("contrastive_gradient_cuda", &contrastive_gradient, arg("products"), arg("stride"), arg("rows"),
             arg("cols"), arg("a"), arg("q"), arg("scale"), arg("bias"), arg("offset"), arg("row"), arg("row_stride"),
             arg("col"), arg("col_stride"), arg("row_weight"), arg("col_weight"), arg("own_g"), arg("out"),
             arg("out_stride"), arg("type"), arg("left"), arg("right"), arg("factor"), arg("scaled"), arg("device"),
             arg("stream"));
  module.def("sigmoid_cuda", &sigmoid, arg("products"), arg("stride"), arg("rows"), arg("cols"), arg("a"), arg("q"),
             arg("scale"), arg("bias"), arg("offset"), arg("alpha"), arg("loss"), arg("d_scale"), arg("d_bias"),
             arg("scratch"), arg("out"), arg("out_stride"), arg("type"), arg("left"), arg("right"), arg("factor"),
             arg("scaled"), arg("device"), arg("stream"));
  module.def("widen_cuda", &widen, arg("codes"), arg("stride"), arg("rows"), arg("dim"), arg("out"), arg("type"),
             arg("device"), arg("stream"));
#else
  (void)module;
#endif
}
