// The pair losses' passes over a matrix of scores on the GPU, tile by tile.
//
//   statistics:  for tiles of rows: for tiles of columns:        gradients, and the sigmoid loss:
//                    P = x[rows] t[cols]^T          cuBLAS            for tiles of rows: for tiles of columns:
//                    statistics of P                kernel                P as on the left, or kept
//                                                                         G[rows, cols] = gradient of P      kernel
//                                                                     d_image = G t;  d_text += G^T x        cuBLAS
//
// If the tile is small enough, its P stays in the GPU's L2 cache between cuBLAS and the kernel: 2048 x 4096 is 32 MB.
// Its product reads (rows + cols) dim elements for rows cols dim multiply-adds: 1365 FLOP a byte in 16 bits, where an
// H100 has 266; a tile of 128 rows and all columns would have 128. G holds all columns, so that each gradient is one
// product; only a trained text's gradient is added to memory, once for all rows of a call.
#pragma once
#include "pairs_cuda.h"

namespace lift_fast::gpu {

// cublasGemmEx of the cuBLAS that the process has already loaded, by address, so that no library is linked and no
// header is needed.
struct Gemm {
  std::uintptr_t function, handle;  // the handle's stream must be the pass's
};

// Features of one type; rows and cols are at least 1. ScoreTile explains the last two lines.
struct Features {
  const void *x, *t;  // [rows, dim], [cols, dim], rows x_stride and t_stride apart
  int64_t x_stride, t_stride, rows, cols, dim;
  Element type;
  const float *a, *q, *scale, *bias;
  int64_t offset;
};

// How the score matrix is divided into tiles, and where the products go.
struct Tiling {
  int64_t rows, cols;  // of a tile, at most
  float* products;     // kept: [features.rows, features.cols]; else one tile. Rows `stride` apart
  int64_t stride;
  bool kept;
};

// The gradients of the features; null: not wanted.
struct FeatureGradients {
  void* image;  // [rows, dim] of float32 or the features' type, rows image_stride apart, overwritten
  int64_t image_stride;
  Element image_type;
  float* text;  // float32 [cols, dim], rows text_stride apart, added to
  int64_t text_stride;
};

// Floats of scratch that a pass needs for the largest of its tiles.
int64_t stats_pass_scratch(int64_t rows, int64_t cols, int64_t tile_rows, int64_t tile_cols);
int64_t sigmoid_pass_scratch(int64_t rows, int64_t cols, int64_t tile_rows, int64_t tile_cols);

// The passes are asynchronous on `stream`, give the same bits at every run on one kind of GPU, and return null or an
// error message. With tiling.kept the statistics and the sigmoid loss write the products there, and the gradients read
// them.
const char* stats_pass(const Features& features, const Gemm& gemm, const Tiling& tiling, const Stats& to, int device,
                       std::uintptr_t stream);
// g.out: [rows, cols] of the features' type, g.left and g.right as in Gradient. In float32, products that are not kept
// may lie in g.out itself: then tiling.products is null.
const char* gradient_pass(const Features& features, const Gemm& gemm, const Tiling& tiling, const Softmax& softmax,
                          const Gradient& g, const FeatureGradients& to, int device, std::uintptr_t stream);
// g.out null: only the loss.
const char* sigmoid_pass(const Features& features, const Gemm& gemm, const Tiling& tiling, const Sigmoid& sums,
                         const Gradient& g, const FeatureGradients& to, int device, std::uintptr_t stream);

// See positives.cu and `positives` in lift_fast/ops/pairs/contract.py.
struct Positives {
  const float* row;  // (m, l, w) [3, n], row_stride apart, without the positives
  int64_t row_stride;
  const float* col;
  int64_t col_stride;
  const float* c;  // [n], of the positives
  int64_t n;
  const float *scale, *bias;
  float weight;
  float* out;  // [9, n]
};
const char* positives(const Positives& job, int device, std::uintptr_t stream);

}  // namespace lift_fast::gpu
