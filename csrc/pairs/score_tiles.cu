// See score_tiles.h: the loops over blocks, and the products by cuBLAS.
#include "score_tiles.h"

#include <algorithm>

#include "pairs.cuh"

namespace lift_fast::gpu {
namespace {

// cublas_api.h and library_types.h, as they have been since CUDA 11.
using GemmEx = int (*)(void* handle, int trans_a, int trans_b, int m, int n, int k, const void* alpha, const void* a,
                       int a_type, int lda, const void* b, int b_type, int ldb, const void* beta, void* c, int c_type,
                       int ldc, int compute_type, int algorithm);
constexpr int kNotTransposed = 0, kTransposed = 1, kCompute32F = 68, kDefaultAlgorithm = -1;

int cuda_type(Out type) { return type == Out::f32 ? 0 : type == Out::f16 ? 2 : 14; }
int64_t size_of(Out type) { return type == Out::f32 ? 4 : 2; }

template <typename T>
T* shifted(T* pointer, int64_t by) {
  return pointer ? pointer + by : nullptr;
}
const void* row_of(const void* matrix, int64_t row, int64_t stride, Out type) {
  return static_cast<const char*>(matrix) + row * stride * size_of(type);
}

struct Matrix {
  const void* data;
  int64_t stride;
  Out type;
};

// c [m, n] = a b (+ c, if `add`) for matrices stored row by row; transposed: op is applied to what is stored.
// cuBLAS counts by columns, so it is told c^T = b^T a^T.
const char* multiply(const Gemm& gemm, int64_t m, int64_t n, int64_t k, Matrix a, bool a_transposed, Matrix b,
                     bool b_transposed, void* c, int64_t c_stride, Out c_type, bool add) {
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

Matrix images(const Features& of, int64_t row) {
  return {row_of(of.x, row, of.x_stride, of.type), of.x_stride, of.type};
}
Matrix texts(const Features& of, int64_t col) {
  return {row_of(of.t, col, of.t_stride, of.type), of.t_stride, of.type};
}

// visit(scores, row, col) for every block, with its products; form: they are formed first, else they were kept before.
// in_place: they lie where the gradient will, not where `by` says; both are float32 then.
template <typename Visit>
const char* over_blocks(const Features& of, const Gemm& gemm, const Blocks& by, bool form, const Gradient* in_place,
                        Visit visit) {
  for (int64_t row = 0; row < of.rows; row += by.rows) {
    for (int64_t col = 0; col < of.cols; col += by.cols) {
      const int64_t rows = std::min(by.rows, of.rows - row), cols = std::min(by.cols, of.cols - col);
      float* products = by.kept ? by.products + row * by.stride + col : by.products;
      int64_t stride = by.stride;
      if (in_place) {
        products = static_cast<float*>(in_place->out) + row * in_place->stride + col;
        stride = in_place->stride;
      }
      if (form) {
        const char* error = multiply(gemm, rows, cols, of.dim, images(of, row), false, texts(of, col), true, products,
                                     stride, Out::f32, false);
        if (error) return error;
      }
      const Scores scores{products,
                          stride,
                          rows,
                          cols,
                          shifted(of.a, row),
                          shifted(of.q, col),
                          of.scale,
                          of.bias,
                          of.offset + row - col};
      if (const char* error = visit(scores, row, col)) return error;
    }
  }
  return nullptr;
}

Gradient part(const Gradient& g, int64_t row, int64_t col) {
  Gradient here = g;
  if (g.out) here.out = static_cast<char*>(g.out) + (row * g.stride + col) * size_of(g.type);
  here.left = shifted(g.left, row);
  here.right = shifted(g.right, col);
  return here;
}

const char* multiply_gradients(const Features& of, const Gemm& gemm, const Gradient& g, const FeatureGradients& to) {
  const Matrix gradient{g.out, g.stride, g.type};
  if (to.image) {
    const char* error = multiply(gemm, of.rows, of.dim, of.cols, gradient, false, texts(of, 0), false, to.image,
                                 to.image_stride, to.image_type, false);
    if (error) return error;
  }
  if (!to.text) return nullptr;
  return multiply(gemm, of.cols, of.dim, of.rows, gradient, true, images(of, 0), false, to.text, to.text_stride,
                  Out::f32, true);
}

// The most that `needs` asks for, of the shapes that blocks have: whole ones, and those at the edges.
template <typename Needs>
int64_t most(int64_t rows, int64_t cols, int64_t block_rows, int64_t block_cols, Needs needs) {
  int64_t found = 0;
  for (const int64_t high : {std::min(block_rows, rows), rows % block_rows})
    for (const int64_t wide : {std::min(block_cols, cols), cols % block_cols})
      if (high && wide) found = std::max(found, needs(high, wide));
  return found;
}

// Runs a pass with its device current, as cuBLAS wants it.
template <typename Pass>
const char* with_device(int device, Pass pass) {
  const char* failed = nullptr;
  const char* error = on_device(device, [&] { failed = pass(); });
  return failed ? failed : error;
}

}  // namespace

int64_t stats_pass_scratch(int64_t rows, int64_t cols, int64_t block_rows, int64_t block_cols) {
  return most(rows, cols, block_rows, block_cols, stats_scratch);
}

int64_t sigmoid_pass_scratch(int64_t rows, int64_t cols, int64_t block_rows, int64_t block_cols) {
  return most(rows, cols, block_rows, block_cols, sigmoid_scratch);
}

const char* stats_pass(const Features& of, const Gemm& gemm, const Blocks& by, const Stats& to, int device,
                       std::uintptr_t stream) {
  return with_device(device, [&] {
    return over_blocks(of, gemm, by, true, nullptr, [&](const Scores& scores, int64_t row, int64_t col) {
      const Stats here{to.row + row, to.row_stride, to.col + col, to.col_stride, to.own + row, to.scratch};
      return contrastive_stats(scores, here, device, stream);
    });
  });
}

const char* gradient_pass(const Features& of, const Gemm& gemm, const Blocks& by, const Softmax& softmax,
                          const Gradient& g, const FeatureGradients& to, int device, std::uintptr_t stream) {
  return with_device(device, [&] {
    const Gradient* in_place = by.products ? nullptr : &g;
    const char* error =
        over_blocks(of, gemm, by, !by.kept, in_place, [&](const Scores& scores, int64_t row, int64_t col) {
          Softmax here = softmax;
          here.row = shifted(softmax.row, row);
          here.col = shifted(softmax.col, col);
          here.own = shifted(softmax.own, row);
          return contrastive_gradient(scores, here, part(g, row, col), device, stream);
        });
    return error ? error : multiply_gradients(of, gemm, g, to);
  });
}

const char* sigmoid_pass(const Features& of, const Gemm& gemm, const Blocks& by, const Sigmoid& sums,
                         const Gradient& g, const FeatureGradients& to, int device, std::uintptr_t stream) {
  return with_device(device, [&] {
    const Gradient* in_place = by.products ? nullptr : &g;
    const char* error = over_blocks(of, gemm, by, true, in_place, [&](const Scores& scores, int64_t row, int64_t col) {
      Sigmoid here = sums;
      here.loss = shifted(sums.loss, row);
      here.d_scale = shifted(sums.d_scale, row);
      here.d_bias = shifted(sums.d_bias, row);
      return sigmoid(scores, here, part(g, row, col), device, stream);
    });
    return error || !g.out ? error : multiply_gradients(of, gemm, g, to);
  });
}

}  // namespace lift_fast::gpu
