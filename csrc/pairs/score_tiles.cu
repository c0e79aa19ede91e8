// The loops over score tiles, and the products by cuBLAS; see score_tiles.h.
#include "score_tiles.h"

#include <algorithm>

#include "common/device.cuh"

namespace lift_fast::gpu {
namespace {

// As in cublas_api.h and library_types.h since CUDA 11.
using GemmEx = int (*)(void* handle, int trans_a, int trans_b, int m, int n, int k, const void* alpha, const void* a,
                       int a_type, int lda, const void* b, int b_type, int ldb, const void* beta, void* c, int c_type,
                       int ldc, int compute_type, int algorithm);
constexpr int kNotTransposed = 0, kTransposed = 1, kCompute32F = 68, kDefaultAlgorithm = -1;

int cuda_type(Element type) { return type == Element::f32 ? 0 : type == Element::f16 ? 2 : 14; }

template <typename T>
T* shifted(T* pointer, int64_t by) {
  return pointer ? pointer + by : nullptr;
}
const void* row_of(const void* matrix, int64_t row, int64_t stride, Element type) {
  return static_cast<const char*>(matrix) + row * stride * bytes_of(type);
}

struct Matrix {
  const void* data;
  int64_t stride;
  Element type;
};

// c [m, n] = a b (+ c, if `add`) for matrices stored row by row; a_transposed, b_transposed: what is stored is a^T,
// b^T. cuBLAS takes matrices stored column by column, so it computes c^T = b^T a^T.
const char* multiply(const Gemm& gemm, int64_t m, int64_t n, int64_t k, Matrix a, bool a_transposed, Matrix b,
                     bool b_transposed, void* c, int64_t c_stride, Element c_type, bool add) {
  const float one = 1.f, zero = 0.f;
  const auto call = reinterpret_cast<GemmEx>(gemm.function);
  const int status = call(reinterpret_cast<void*>(gemm.handle), b_transposed ? kTransposed : kNotTransposed,
                          a_transposed ? kTransposed : kNotTransposed, static_cast<int>(n), static_cast<int>(m),
                          static_cast<int>(k), &one, b.data, cuda_type(b.type), static_cast<int>(b.stride), a.data,
                          cuda_type(a.type), static_cast<int>(a.stride), add ? &one : &zero, c, cuda_type(c_type),
                          static_cast<int>(c_stride), kCompute32F, kDefaultAlgorithm);
  switch (status) {
    case 0: return nullptr;
    case 3: return "cuBLAS has no memory";
    case 7: return "cuBLAS refuses a product: invalid value";
    case 13: return "cuBLAS failed to execute a product";
    case 15: return "cuBLAS does not support a product";
    default: return "cuBLAS failed";
  }
}

Matrix images(const Features& features, int64_t row) {
  return {row_of(features.x, row, features.x_stride, features.type), features.x_stride, features.type};
}
Matrix texts(const Features& features, int64_t col) {
  return {row_of(features.t, col, features.t_stride, features.type), features.t_stride, features.type};
}

// Calls visit(scores, row, col) for every tile. form: its products are formed first, else they were kept before.
// in_place: they lie where the gradient will, not where `tiling` says; both are float32 then.
template <typename Visit>
const char* over_tiles(const Features& features, const Gemm& gemm, const Tiling& tiling, bool form,
                       const Gradient* in_place, Visit visit) {
  for (int64_t row = 0; row < features.rows; row += tiling.rows) {
    for (int64_t col = 0; col < features.cols; col += tiling.cols) {
      const int64_t rows = std::min(tiling.rows, features.rows - row);
      const int64_t cols = std::min(tiling.cols, features.cols - col);
      float* products = tiling.kept ? tiling.products + row * tiling.stride + col : tiling.products;
      int64_t stride = tiling.stride;
      if (in_place) {
        products = static_cast<float*>(in_place->out) + row * in_place->stride + col;
        stride = in_place->stride;
      }
      if (form) {
        const char* error = multiply(gemm, rows, cols, features.dim, images(features, row), false,
                                     texts(features, col), true, products, stride, Element::f32, false);
        if (error) return error;
      }
      const ScoreTile scores{products,
                          stride,
                          rows,
                          cols,
                          shifted(features.a, row),
                          shifted(features.q, col),
                          features.scale,
                          features.bias,
                          features.offset + row - col};
      if (const char* error = visit(scores, row, col)) return error;
    }
  }
  return nullptr;
}

// What of g belongs to the tile that begins at (row, col).
Gradient part(const Gradient& g, int64_t row, int64_t col) {
  Gradient tile = g;
  if (g.out) tile.out = static_cast<char*>(g.out) + (row * g.stride + col) * bytes_of(g.type);
  tile.left = shifted(g.left, row);
  tile.right = shifted(g.right, col);
  return tile;
}

const char* multiply_gradients(const Features& features, const Gemm& gemm, const Gradient& g,
                               const FeatureGradients& to) {
  const Matrix gradient{g.out, g.stride, g.type};
  if (to.image) {
    const char* error = multiply(gemm, features.rows, features.dim, features.cols, gradient, false,
                                 texts(features, 0), false, to.image, to.image_stride, to.image_type, false);
    if (error) return error;
  }
  if (!to.text) return nullptr;
  return multiply(gemm, features.cols, features.dim, features.rows, gradient, true, images(features, 0), false,
                  to.text, to.text_stride, Element::f32, true);
}

// The largest value of needs(rows, cols) over the shapes that tiles have: whole ones, and those at the edges.
template <typename Needs>
int64_t most(int64_t rows, int64_t cols, int64_t tile_rows, int64_t tile_cols, Needs needs) {
  int64_t found = 0;
  for (const int64_t high : {std::min(tile_rows, rows), rows % tile_rows})
    for (const int64_t wide : {std::min(tile_cols, cols), cols % tile_cols})
      if (high && wide) found = std::max(found, needs(high, wide));
  return found;
}

// Runs a pass with its device current, as cuBLAS requires.
template <typename Pass>
const char* with_device(int device, Pass pass) {
  const char* failed = nullptr;
  const char* error = on_device(device, [&] { failed = pass(); });
  return failed ? failed : error;
}

}  // namespace

int64_t stats_pass_scratch(int64_t rows, int64_t cols, int64_t tile_rows, int64_t tile_cols) {
  return most(rows, cols, tile_rows, tile_cols, stats_scratch);
}

int64_t sigmoid_pass_scratch(int64_t rows, int64_t cols, int64_t tile_rows, int64_t tile_cols) {
  return most(rows, cols, tile_rows, tile_cols, sigmoid_scratch);
}

const char* stats_pass(const Features& features, const Gemm& gemm, const Tiling& tiling, const Stats& to, int device,
                       std::uintptr_t stream) {
  return with_device(device, [&] {
    return over_tiles(features, gemm, tiling, true, nullptr, [&](const ScoreTile& scores, int64_t row, int64_t col) {
      const Stats tile{to.row + row, to.row_stride, to.col + col, to.col_stride, to.positive + row, to.scratch};
      return contrastive_stats(scores, tile, device, stream);
    });
  });
}

const char* gradient_pass(const Features& features, const Gemm& gemm, const Tiling& tiling, const Softmax& softmax,
                          const Gradient& g, const FeatureGradients& to, int device, std::uintptr_t stream) {
  return with_device(device, [&] {
    const Gradient* in_place = tiling.products ? nullptr : &g;
    const auto visit = [&](const ScoreTile& scores, int64_t row, int64_t col) {
      Softmax tile = softmax;
      tile.row = shifted(softmax.row, row);
      tile.col = shifted(softmax.col, col);
      tile.positive = shifted(softmax.positive, row);
      return contrastive_gradient(scores, tile, part(g, row, col), device, stream);
    };
    const char* error = over_tiles(features, gemm, tiling, !tiling.kept, in_place, visit);
    return error ? error : multiply_gradients(features, gemm, g, to);
  });
}

const char* sigmoid_pass(const Features& features, const Gemm& gemm, const Tiling& tiling, const Sigmoid& sums,
                         const Gradient& g, const FeatureGradients& to, int device, std::uintptr_t stream) {
  return with_device(device, [&] {
    const Gradient* in_place = tiling.products ? nullptr : &g;
    const auto visit = [&](const ScoreTile& scores, int64_t row, int64_t col) {
      Sigmoid tile = sums;
      tile.loss = shifted(sums.loss, row);
      tile.d_scale = shifted(sums.d_scale, row);
      tile.d_bias = shifted(sums.d_bias, row);
      return sigmoid(scores, tile, part(g, row, col), device, stream);
    };
    const char* error = over_tiles(features, gemm, tiling, true, in_place, visit);
    return error || !g.out ? error : multiply_gradients(features, gemm, g, to);
  });
}

}  // namespace lift_fast::gpu
