// Attention on the CPU (arXiv 1706.03762, eq. 1), whole rows of scores at a time; the gradient recomputes them.
//
//   S = scale q k^T,  P = exp(S - lse),  out = P v
//   dP = d_out v^T,  delta_i = sum_j P_ij dP_ij,  dS = P (dP - delta)
//   dv = P^T d_out,  dq = scale dS k,  dk = scale dS^T q
//
//   for each image and head (one thread):          k, v: packed once, in L2
//     for each band of queries:                    q, d_out: copied, in L1
//       S, dP [band, tokens] = q k^T, d_out v^T    6 x 64 sums in registers, 24 products a word
//       S -> P, dP -> dS                           whole rows: one exponential an element, no running maximum
//       out, dq [band, dim] = P v, dS k;   dv, dk [tokens, dim] += P^T d_out, dS^T q
//
// FLOPs: tokens^2 dim times 4 forward, 10 backward, 12 with out. Bytes from memory: q, k, v, out and their gradients
// once, so the bound is arithmetic. In float32 a band's S and dP take 8 band tokens bytes, k and v packed two ways 16
// tokens dim, dk and dv 8 tokens dim: 0.5 MB of L2 at 197 tokens of dim 64. One thread adds up all bands of a head in
// order, so the bits are the same at every run and for any number of threads.
#include "attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "common/exp2.h"
#include "common/floats.h"
#include "common/integers.h"
#include "common/micro_tile.h"
#include "common/parallel.h"
#include "common/scratch.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace lift_fast {
namespace {

constexpr int64_t kForwardRows = 48, kBackwardRows = 96;  // of a band of queries, at most
// Rows to prefetch ahead: a head's rows are pages apart, which no hardware prefetcher follows.
constexpr int64_t kAhead = 8;

constexpr float kLog2e = 1.44269502162933349609f, kLog2eRest = 1.92596299112661746887e-8f;  // their sum is log2(e)

struct AttentionPass {
  Attention job;
  bool backward;
  char *out, *d_qkv;
  const char* d_out;
  float* lse_out;
  const float* lse;
  int64_t band_rows, bands, parts;  // a head's bands are divided into `parts` tasks
  float* scratch;
  int64_t scratch_stride;
};

// Where the rows of one image and head begin; strides from token to token, in elements of `bytes` bytes.
struct Head {
  int64_t bytes, stride, out_stride;
  const char *q, *k, *v, *d_out;
  char *out, *dq, *dk, *dv;
};

Head head_of(const AttentionPass& pass, int64_t index) {
  const Attention& job = pass.job;
  const int64_t bytes = bytes_of(job.type), width = job.heads * job.dim;
  const int64_t image = index / job.heads, column = index % job.heads * job.dim;
  const int64_t from = (image * job.tokens * 3 * width + column) * bytes, third = width * bytes;
  const int64_t out = (image * job.tokens * width + column) * bytes;
  const char* qkv = static_cast<const char*>(job.qkv) + from;
  Head head{bytes, 3 * width, width, qkv, qkv + third, qkv + 2 * third, nullptr, nullptr, nullptr, nullptr, nullptr};
  if (pass.out) head.out = pass.out + out;
  if (pass.backward) {
    head.d_out = pass.d_out + out;
    head.dq = pass.d_qkv + from;
    head.dk = head.dq + third;
    head.dv = head.dk + third;
  }
  return head;
}

#define KERNELS "attention/attention_kernels.h"
#include "common/isas.h"

// The loops for one instruction set and one kind of word: a float or two bf16.
struct Kernels {
  void (*forward)(const AttentionPass&, int64_t, int);
  void (*backward)(const AttentionPass&, int64_t, int);
  int64_t (*floats)(const AttentionPass&);
};

#define LF_KERNELS(isa, bf16) \
  Kernels { isa::forward_task<bf16>, isa::backward_task<bf16>, isa::workspace_floats<bf16> }

Kernels kernels_for(Element type, Isa isa) {
#if defined(__x86_64__)
  isa = std::min(isa, best_isa());
  if (isa == Isa::avx512_bf16 && type == Element::bf16) return LF_KERNELS(avx512_bf16, true);
  if (isa >= Isa::avx512) return LF_KERNELS(avx512, false);
  if (isa == Isa::avx2) return LF_KERNELS(avx2, false);
#endif
  return LF_KERNELS(scalar, false);
}

void run(AttentionPass& pass, int64_t most_rows, int threads, Isa isa) {
  const Attention& job = pass.job;
  const int64_t heads = job.batch * job.heads;
  if (!heads || !job.tokens) return;
  threads = std::max(threads, 1);
  const Kernels kernels = kernels_for(job.type, isa);
  pass.band_rows = rounded_up(ceil_div(job.tokens, ceil_div(job.tokens, most_rows)), kMicroRows);
  pass.bands = ceil_div(job.tokens, pass.band_rows);
  pass.parts = 1;
  // With few heads several tasks share a head, and each packs k and v for itself.
  if (!pass.backward && heads < 2 * threads) pass.parts = std::min(ceil_div(2 * threads, heads), pass.bands);
  pass.scratch_stride = rounded_up(kernels.floats(pass), 1024) + 64;
  const int64_t tasks = heads * pass.parts;
  const Scratch scratch = scratch_floats(pass.scratch_stride * std::min<int64_t>(threads, tasks));
  pass.scratch = scratch.get();
  parallel(tasks, threads, pass, pass.backward ? kernels.backward : kernels.forward);
}

}  // namespace

void attention_forward_cpu(const Attention& attention, void* out, float* lse, int threads, Isa isa) {
  AttentionPass pass{};
  pass.job = attention;
  pass.out = static_cast<char*>(out);
  pass.lse_out = lse;
  run(pass, kForwardRows, threads, isa);
}

void attention_backward_cpu(const Attention& attention, const void* d_out, const float* lse, void* d_qkv, void* out,
                            int threads, Isa isa) {
  AttentionPass pass{};
  pass.job = attention;
  pass.backward = true;
  pass.d_out = static_cast<const char*>(d_out);
  pass.lse = lse;
  pass.d_qkv = static_cast<char*>(d_qkv);
  pass.out = static_cast<char*>(out);
  run(pass, kBackwardRows, threads, isa);
}

}  // namespace lift_fast
