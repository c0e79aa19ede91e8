// The pair losses' passes over a matrix of scores on the GPU, block by block.
//
//   statistics:  for blocks of rows: for blocks of columns:       gradients, and the sigmoid loss:
//                    P = x[rows] t[cols]^T          cuBLAS             for blocks of rows: for blocks of columns:
//                    statistics of P                kernel                 P as on the left, or kept
//                                                                          G[rows, cols] = gradient of P      kernel
//                                                                      d_image = G t;  d_text += G^T x        cuBLAS
//
// A block's P stays in the GPU's L2 cache between its two users where the block is small enough: 2048 x 4096 is 32 MB.
// Its product reads (rows + cols) dim elements for rows cols dim multiply-adds: 1365 FLOP a byte in 16 bits, where an
// H100 has 266; a strip of 128 rows would have 128. G is whole over the columns, so that each gradient is one product,
// with nothing added to memory block after block but a trained text's gradient, once for all rows of a call.
#pragma once
#include "pairs_cuda.h"

namespace lift_fast::gpu {

// cublasGemmEx of the cuBLAS that the process has loaded already, by address: nothing is linked, no header is needed.
struct Gemm {
  std::uintptr_t function, handle;  // the handle's stream is the one that the pass is given
};

// Features of one type; rows and cols are at least 1. See Scores for the rest.
struct Features {
  const void *x, *t;  // [rows, dim], [cols, dim], x_stride and t_stride apart
  int64_t x_stride, t_stride, rows, cols, dim;
  Out type;
  const float *a, *q, *scale, *bias;
  int64_t offset;
};

// Where products go, and how the matrix is cut.
struct Blocks {
  int64_t rows, cols;  // of a block, at most
  float* products;     // kept: [features.rows, features.cols]; else room for one block. Rows `stride` apart
  int64_t stride;
  bool kept;
};

// The gradients of the features; null: not asked.
struct FeatureGradients {
  void* image;  // [rows, dim] of float32 or the features' type, image_stride apart, overwritten
  int64_t image_stride;
  Out image_type;
  float* text;  // float32 [cols, dim], text_stride apart, added to
  int64_t text_stride;
};

// Floats of scratch that a pass over a matrix cut into blocks needs for any of them.
int64_t stats_pass_scratch(int64_t rows, int64_t cols, int64_t block_rows, int64_t block_cols);
int64_t sigmoid_pass_scratch(int64_t rows, int64_t cols, int64_t block_rows, int64_t block_cols);

// Null, or what went wrong. Asynchronous on `stream`. The same bits at every run on one kind of GPU.
// With by.kept the products are written there, and taken from there by the gradients.
const char* stats_pass(const Features& of, const Gemm& gemm, const Blocks& by, const Stats& to, int device,
                       std::uintptr_t stream);
// g.out: [rows, cols] of the features' type, g.left and g.right as in Gradient. In float32, products that are not kept
// may lie in g.out itself: by.products = null.
const char* gradient_pass(const Features& of, const Gemm& gemm, const Blocks& by, const Softmax& softmax,
                          const Gradient& g, const FeatureGradients& to, int device, std::uintptr_t stream);
// g.out null: the loss alone.
const char* sigmoid_pass(const Features& of, const Gemm& gemm, const Blocks& by, const Sigmoid& sums,
                         const Gradient& g, const FeatureGradients& to, int device, std::uintptr_t stream);

// See positives.cu and own_pairs of lift_fast/ops/pairs/contract.py.
struct OwnPairs {
  const float* row;  // (m, l, w) [3, n], row_stride apart, without the own pairs
  int64_t row_stride;
  const float* col;
  int64_t col_stride;
  const float* own;  // [n]: c of the own pairs
  int64_t n;
  const float *scale, *bias;
  float weight;
  float* out;  // [9, n]
};
const char* own_pairs(const OwnPairs& of, int device, std::uintptr_t stream);

}  // namespace lift_fast::gpu
