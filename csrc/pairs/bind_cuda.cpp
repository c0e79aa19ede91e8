// The pair losses on a GPU for Python, and the widening of int8 text; addresses are integers. See score_tiles.h.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "build_info.h"  // written by setup.py: LIFT_FAST_CUDA
#include "rows/dequant.h"
#if LIFT_FAST_CUDA
#include "score_tiles.h"
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

Out out_type(int type) {
  if (type < 0 || type > 2) throw std::invalid_argument("type must be 0 (float32), 1 (bfloat16) or 2 (float16)");
  return static_cast<Out>(type);
}

// A matrix of scores and how a pass goes through it: the first arguments of all passes.
struct Pass {
  gpu::Features of;
  gpu::Blocks by;
  gpu::Gemm gemm;
};

Pass pass(Address x, int64_t x_stride, Address t, int64_t t_stride, int64_t rows, int64_t cols, int64_t dim, int type,
          Address a, Address q, Address scale, Address bias, int64_t offset, int64_t block_rows, int64_t block_cols,
          Address products, int64_t products_stride, bool kept, Address gemm, Address handle) {
  if (rows < 1 || cols < 1 || dim < 1 || block_rows < 1 || block_cols < 1)
    throw std::invalid_argument("rows, cols, dim and both sizes of a block must be at least 1");
  if (rows > INT32_MAX || cols > INT32_MAX || dim > INT32_MAX)
    throw std::invalid_argument("cuBLAS counts rows, cols and dim in 31 bits");
  return {{at<const void>(x), at<const void>(t), x_stride, t_stride, rows, cols, dim, out_type(type),
           at<const float>(a), at<const float>(q), at<const float>(scale), at<const float>(bias), offset},
          {block_rows, block_cols, at<float>(products), products_stride, kept},
          {gemm, handle}};
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

void contrastive_stats(Address x, int64_t x_stride, Address t, int64_t t_stride, int64_t rows, int64_t cols,
                       int64_t dim, int type, Address a, Address q, Address scale, Address bias, int64_t offset,
                       int64_t block_rows, int64_t block_cols, Address products, int64_t products_stride, bool kept,
                       Address gemm, Address handle, Address row, int64_t row_stride, Address col, int64_t col_stride,
                       Address own, Address scratch, int device, Address stream) {
  const Pass by = pass(x, x_stride, t, t_stride, rows, cols, dim, type, a, q, scale, bias, offset, block_rows,
                       block_cols, products, products_stride, kept, gemm, handle);
  const gpu::Stats to{at<float>(row), row_stride, at<float>(col), col_stride, at<float>(own), at<float>(scratch)};
  run("contrastive statistics", [&] { return gpu::stats_pass(by.of, by.gemm, by.by, to, device, stream); });
}

void contrastive_gradient(Address x, int64_t x_stride, Address t, int64_t t_stride, int64_t rows, int64_t cols,
                          int64_t dim, int type, Address a, Address q, Address scale, Address bias, int64_t offset,
                          int64_t block_rows, int64_t block_cols, Address products, int64_t products_stride, bool kept,
                          Address gemm, Address handle, Address row, int64_t row_stride, Address col,
                          int64_t col_stride, float row_weight, float col_weight, Address own_g, Address g,
                          int64_t g_stride, Address left, Address right, float factor, bool scaled, Address image,
                          int64_t image_stride, int image_type, Address text, int64_t text_stride, int device,
                          Address stream) {
  const Pass by = pass(x, x_stride, t, t_stride, rows, cols, dim, type, a, q, scale, bias, offset, block_rows,
                       block_cols, products, products_stride, kept, gemm, handle);
  const gpu::Softmax softmax{at<const float>(row), row_stride, at<const float>(col), col_stride, row_weight, col_weight,
                             at<const float>(own_g)};
  const gpu::Gradient through{at<void>(g), g_stride, by.of.type, at<const float>(left), at<const float>(right), factor,
                              scaled};
  const gpu::FeatureGradients to{at<void>(image), image_stride, out_type(image_type), at<float>(text), text_stride};
  run("contrastive gradient",
      [&] { return gpu::gradient_pass(by.of, by.gemm, by.by, softmax, through, to, device, stream); });
}

void sigmoid(Address x, int64_t x_stride, Address t, int64_t t_stride, int64_t rows, int64_t cols, int64_t dim,
             int type, Address a, Address q, Address scale, Address bias, int64_t offset, int64_t block_rows,
             int64_t block_cols, Address products, int64_t products_stride, bool kept, Address gemm, Address handle,
             float alpha, Address loss, Address d_scale, Address d_bias, Address scratch, Address g, int64_t g_stride,
             Address left, Address right, float factor, bool scaled, Address image, int64_t image_stride,
             int image_type, Address text, int64_t text_stride, int device, Address stream) {
  const Pass by = pass(x, x_stride, t, t_stride, rows, cols, dim, type, a, q, scale, bias, offset, block_rows,
                       block_cols, products, products_stride, kept, gemm, handle);
  const gpu::Sigmoid sums{alpha, at<float>(loss), at<float>(d_scale), at<float>(d_bias), at<float>(scratch)};
  const gpu::Gradient through{at<void>(g), g_stride, by.of.type, at<const float>(left), at<const float>(right), factor,
                              scaled};
  const gpu::FeatureGradients to{at<void>(image), image_stride, out_type(image_type), at<float>(text), text_stride};
  run("sigmoid loss", [&] { return gpu::sigmoid_pass(by.of, by.gemm, by.by, sums, through, to, device, stream); });
}

void own_pairs(Address row, int64_t row_stride, Address col, int64_t col_stride, Address own, int64_t n, Address scale,
               Address bias, float weight, Address out, int device, Address stream) {
  const gpu::OwnPairs of{at<const float>(row), row_stride, at<const float>(col), col_stride, at<const float>(own), n,
                         at<const float>(scale), at<const float>(bias), weight, at<float>(out)};
  run("own pairs", [&] { return gpu::own_pairs(of, device, stream); });
}

void widen(Address codes, int64_t stride, int64_t rows, int64_t dim, Address out, int type, int device,
           Address stream) {
  const Dequant job{at<const void>(codes), nullptr, nullptr, at<void>(out), rows, rows, dim, stride, 0, Codec::int8,
                    out_type(type), false};
  if (const char* error = dequant_cuda(job, device, stream))
    throw std::runtime_error(std::string("widening on the GPU: ") + error);
}

}  // namespace
}  // namespace lift_fast
#endif

void bind_pairs_cuda(py::module_& module) {
#if LIFT_FAST_CUDA
  using namespace lift_fast;
  using py::arg;
  module.def("contrastive_stats_scratch", &gpu::stats_pass_scratch, arg("rows"), arg("cols"), arg("block_rows"),
             arg("block_cols"));
  module.def("sigmoid_scratch", &gpu::sigmoid_pass_scratch, arg("rows"), arg("cols"), arg("block_rows"),
             arg("block_cols"));
  module.def("contrastive_stats_cuda", &contrastive_stats, arg("x"), arg("x_stride"), arg("t"), arg("t_stride"),
             arg("rows"), arg("cols"), arg("dim"), arg("type"), arg("a"), arg("q"), arg("scale"), arg("bias"), arg("offset"),
             arg("block_rows"), arg("block_cols"), arg("products"), arg("products_stride"), arg("kept"), arg("gemm"),
             arg("handle"), arg("row"), arg("row_stride"), arg("col"), arg("col_stride"), arg("own"),
             arg("scratch"), arg("device"), arg("stream"));
  module.def("contrastive_gradient_cuda", &contrastive_gradient, arg("x"), arg("x_stride"), arg("t"), arg("t_stride"),
             arg("rows"), arg("cols"), arg("dim"), arg("type"), arg("a"), arg("q"), arg("scale"), arg("bias"), arg("offset"),
             arg("block_rows"), arg("block_cols"), arg("products"), arg("products_stride"), arg("kept"), arg("gemm"),
             arg("handle"), arg("row"), arg("row_stride"), arg("col"), arg("col_stride"), arg("row_weight"),
             arg("col_weight"), arg("own_g"), arg("g"), arg("g_stride"), arg("left"), arg("right"), arg("factor"),
             arg("scaled"), arg("image"), arg("image_stride"), arg("image_type"), arg("text"), arg("text_stride"),
             arg("device"), arg("stream"));
  module.def("sigmoid_cuda", &sigmoid, arg("x"), arg("x_stride"), arg("t"), arg("t_stride"), arg("rows"),
             arg("cols"), arg("dim"), arg("type"), arg("a"), arg("q"), arg("scale"), arg("bias"), arg("offset"),
             arg("block_rows"), arg("block_cols"), arg("products"), arg("products_stride"), arg("kept"), arg("gemm"),
             arg("handle"), arg("alpha"), arg("loss"), arg("d_scale"), arg("d_bias"), arg("scratch"), arg("g"),
             arg("g_stride"), arg("left"), arg("right"), arg("factor"), arg("scaled"), arg("image"),
             arg("image_stride"), arg("image_type"), arg("text"), arg("text_stride"), arg("device"), arg("stream"));
  module.def("own_pairs_cuda", &own_pairs, arg("row"), arg("row_stride"), arg("col"), arg("col_stride"), arg("own"),
             arg("n"), arg("scale"), arg("bias"), arg("weight"), arg("out"), arg("device"), arg("stream"));
  module.def("widen_cuda", &widen, arg("codes"), arg("stride"), arg("rows"), arg("dim"), arg("out"), arg("type"),
             arg("device"), arg("stream"));
#else
  (void)module;
#endif
}
