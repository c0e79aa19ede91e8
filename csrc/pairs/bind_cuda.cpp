// The pair losses on the GPU, for Python; score_tiles.h has the shapes.
#include <pybind11/pybind11.h>

#include <stdexcept>

#include "build_info.h"  // written by setup.py: LIFT_FAST_CUDA
#include "common/bind.h"
#if LIFT_FAST_CUDA
#include "score_tiles.h"
#endif

namespace py = pybind11;

#if LIFT_FAST_CUDA
namespace lift_fast {
namespace {

// The first arguments of all passes: the matrix of scores, and how a pass goes through it.
struct Pass {
  gpu::Features features;
  gpu::Tiling tiling;
  gpu::Gemm gemm;
};

Pass pass(Address x, int64_t x_stride, Address t, int64_t t_stride, int64_t rows, int64_t cols, int64_t dim, int type,
          Address a, Address q, Address scale, Address bias, int64_t offset, int64_t block_rows, int64_t block_cols,
          Address products, int64_t products_stride, bool kept, Address gemm, Address handle) {
  if (rows < 1 || cols < 1 || dim < 1 || block_rows < 1 || block_cols < 1)
    throw std::invalid_argument("rows, cols, dim, block_rows and block_cols must be at least 1");
  if (rows > INT32_MAX || cols > INT32_MAX || dim > INT32_MAX)
    throw std::invalid_argument("cuBLAS counts rows, cols and dim in 31 bits");
  return {{at<const void>(x), at<const void>(t), x_stride, t_stride, rows, cols, dim, float_type(type),
           at<const float>(a), at<const float>(q), at<const float>(scale), at<const float>(bias), offset},
          {block_rows, block_cols, at<float>(products), products_stride, kept},
          {gemm, handle}};
}

void contrastive_stats(Address x, int64_t x_stride, Address t, int64_t t_stride, int64_t rows, int64_t cols,
                       int64_t dim, int type, Address a, Address q, Address scale, Address bias, int64_t offset,
                       int64_t block_rows, int64_t block_cols, Address products, int64_t products_stride, bool kept,
                       Address gemm, Address handle, Address row, int64_t row_stride, Address col, int64_t col_stride,
                       Address own, Address scratch, int device, Address stream) {
  const Pass job = pass(x, x_stride, t, t_stride, rows, cols, dim, type, a, q, scale, bias, offset, block_rows,
                        block_cols, products, products_stride, kept, gemm, handle);
  const gpu::Stats to{at<float>(row), row_stride, at<float>(col), col_stride, at<float>(own), at<float>(scratch)};
  run_on_gpu("contrastive statistics",
             [&] { return gpu::stats_pass(job.features, job.gemm, job.tiling, to, device, stream); });
}

void contrastive_gradient(Address x, int64_t x_stride, Address t, int64_t t_stride, int64_t rows, int64_t cols,
                          int64_t dim, int type, Address a, Address q, Address scale, Address bias, int64_t offset,
                          int64_t block_rows, int64_t block_cols, Address products, int64_t products_stride, bool kept,
                          Address gemm, Address handle, Address row, int64_t row_stride, Address col,
                          int64_t col_stride, float row_weight, float col_weight, Address own_g, Address g,
                          int64_t g_stride, Address left, Address right, float factor, bool scaled, Address image,
                          int64_t image_stride, int image_type, Address text, int64_t text_stride, int device,
                          Address stream) {
  const Pass job = pass(x, x_stride, t, t_stride, rows, cols, dim, type, a, q, scale, bias, offset, block_rows,
                        block_cols, products, products_stride, kept, gemm, handle);
  const gpu::Softmax softmax{at<const float>(row), row_stride, at<const float>(col), col_stride, row_weight, col_weight,
                             at<const float>(own_g)};
  const gpu::Gradient through{at<void>(g), g_stride, job.features.type, at<const float>(left), at<const float>(right),
                              factor, scaled};
  const gpu::FeatureGradients to{at<void>(image), image_stride, float_type(image_type), at<float>(text), text_stride};
  run_on_gpu("contrastive gradient", [&] {
    return gpu::gradient_pass(job.features, job.gemm, job.tiling, softmax, through, to, device, stream);
  });
}

void sigmoid(Address x, int64_t x_stride, Address t, int64_t t_stride, int64_t rows, int64_t cols, int64_t dim,
             int type, Address a, Address q, Address scale, Address bias, int64_t offset, int64_t block_rows,
             int64_t block_cols, Address products, int64_t products_stride, bool kept, Address gemm, Address handle,
             float alpha, Address loss, Address d_scale, Address d_bias, Address scratch, Address g, int64_t g_stride,
             Address left, Address right, float factor, bool scaled, Address image, int64_t image_stride,
             int image_type, Address text, int64_t text_stride, int device, Address stream) {
  const Pass job = pass(x, x_stride, t, t_stride, rows, cols, dim, type, a, q, scale, bias, offset, block_rows,
                        block_cols, products, products_stride, kept, gemm, handle);
  const gpu::Sigmoid sums{alpha, at<float>(loss), at<float>(d_scale), at<float>(d_bias), at<float>(scratch)};
  const gpu::Gradient through{at<void>(g), g_stride, job.features.type, at<const float>(left), at<const float>(right),
                              factor, scaled};
  const gpu::FeatureGradients to{at<void>(image), image_stride, float_type(image_type), at<float>(text), text_stride};
  run_on_gpu("sigmoid loss", [&] {
    return gpu::sigmoid_pass(job.features, job.gemm, job.tiling, sums, through, to, device, stream);
  });
}

void positives(Address row, int64_t row_stride, Address col, int64_t col_stride, Address own, int64_t n, Address scale,
               Address bias, float weight, Address out, int device, Address stream) {
  const gpu::Positives job{at<const float>(row), row_stride, at<const float>(col), col_stride, at<const float>(own), n,
                           at<const float>(scale), at<const float>(bias), weight, at<float>(out)};
  run_on_gpu("positives", [&] { return gpu::positives(job, device, stream); });
}

}  // namespace
}  // namespace lift_fast
#endif

void bind_pairs_cuda(py::module_& module) {
#if LIFT_FAST_CUDA
  using namespace lift_fast;
  using namespace py::literals;
  module.def("contrastive_stats_scratch", &gpu::stats_pass_scratch, "rows"_a, "cols"_a, "block_rows"_a,
             "block_cols"_a);
  module.def("sigmoid_scratch", &gpu::sigmoid_pass_scratch, "rows"_a, "cols"_a, "block_rows"_a, "block_cols"_a);
  module.def("contrastive_stats_cuda", &contrastive_stats, "x"_a, "x_stride"_a, "t"_a, "t_stride"_a, "rows"_a,
             "cols"_a, "dim"_a, "type"_a, "a"_a, "q"_a, "scale"_a, "bias"_a, "offset"_a, "block_rows"_a,
             "block_cols"_a, "products"_a, "products_stride"_a, "kept"_a, "gemm"_a, "handle"_a, "row"_a,
             "row_stride"_a, "col"_a, "col_stride"_a, "own"_a, "scratch"_a, "device"_a, "stream"_a);
  module.def("contrastive_gradient_cuda", &contrastive_gradient, "x"_a, "x_stride"_a, "t"_a, "t_stride"_a, "rows"_a,
             "cols"_a, "dim"_a, "type"_a, "a"_a, "q"_a, "scale"_a, "bias"_a, "offset"_a, "block_rows"_a,
             "block_cols"_a, "products"_a, "products_stride"_a, "kept"_a, "gemm"_a, "handle"_a, "row"_a,
             "row_stride"_a, "col"_a, "col_stride"_a, "row_weight"_a, "col_weight"_a, "own_g"_a, "g"_a, "g_stride"_a,
             "left"_a, "right"_a, "factor"_a, "scaled"_a, "image"_a, "image_stride"_a, "image_type"_a, "text"_a,
             "text_stride"_a, "device"_a, "stream"_a);
  module.def("sigmoid_cuda", &sigmoid, "x"_a, "x_stride"_a, "t"_a, "t_stride"_a, "rows"_a, "cols"_a, "dim"_a, "type"_a,
             "a"_a, "q"_a, "scale"_a, "bias"_a, "offset"_a, "block_rows"_a, "block_cols"_a, "products"_a,
             "products_stride"_a, "kept"_a, "gemm"_a, "handle"_a, "alpha"_a, "loss"_a, "d_scale"_a, "d_bias"_a,
             "scratch"_a, "g"_a, "g_stride"_a, "left"_a, "right"_a, "factor"_a, "scaled"_a, "image"_a,
             "image_stride"_a, "image_type"_a, "text"_a, "text_stride"_a, "device"_a, "stream"_a);
  module.def("own_pairs_cuda", &positives, "row"_a, "row_stride"_a, "col"_a, "col_stride"_a, "own"_a, "n"_a, "scale"_a,
             "bias"_a, "weight"_a, "out"_a, "device"_a, "stream"_a);
#else
  (void)module;
#endif
}
