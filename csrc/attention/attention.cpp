// Attention on the CPU (arXiv 1706.03762, eq. 1), whole rows of scores at a time; its gradient makes them again.
//
//   S = scale q k^T,  P = exp(S - lse),  out = P v
//   dP = d_out v^T,  delta_i = sum_j P_ij dP_ij,  dS = P (dP - delta)
//   dv = P^T d_out,  dq = scale dS k,  dk = scale dS^T q
//
//   for each picture and head (one thread):         k, v: packed once, in L2
//     for each block of queries:                    q, d_out: copied, in L1
//       S, dP [block, tokens] = q k^T, d_out v^T    6 x 64 sums in registers, 24 products a word
//       S -> P, dP -> dS                            whole rows: one exponential an element, no running maximum
//       out, dq [block, dim] = P v, dS k;   dv, dk [tokens, dim] += P^T d_out, dS^T q
//
// FLOPs: 4 tokens^2 dim forward, 10 backward, 12 with out; bytes from memory: q, k, v, out and their gradients once, so
// the bound is arithmetic. In float32 a block's S and dP take 8 block tokens bytes, k and v packed twice 16 tokens dim,
// dk and dv 8 tokens dim: 0.5 MB of L2 at 197 tokens of dim 64. A head's sums are one thread's, block after block: the
// same bits at every run, whatever the threads.
#include "attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "common/floats.h"
#include "common/parallel.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace lift_fast {
namespace {

constexpr int kMicroRows = 6;
constexpr int64_t kForwardRows = 48, kBackwardRows = 96;  // of a block of queries, at most
constexpr int64_t kWords = 256;
constexpr int64_t kAhead = 8;  // rows: a head's rows are pages apart, where no hardware prefetcher follows

constexpr float kLog2e = 1.44269502162933349609f, kLog2eRest = 1.92596299112661746887e-8f;
constexpr float kExp2[] = {1.f,
                           0.6931472067028323f,
                           0.2402265092228826f,
                           0.055503272266708814f,
                           0.009618056678584931f,
                           0.001340042817725558f,
                           0.00015461444676459477f};
alignas(64) constexpr float kIota[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

struct AttentionPass {
  Attention job;
  bool backward;
  char *out, *d_qkv;
  const char* d_out;
  float* lse_out;
  const float* lse;
  int64_t block_rows, blocks, parts;  // parts: of a head's blocks of queries, a task each
  float* scratch;
  int64_t scratch_stride;
};

// Where a picture's head begins; strides from token to token, in elements of `bytes`.
struct Head {
  int64_t bytes, stride, out_stride;
  const char *q, *k, *v, *d_out;
  char *out, *dq, *dk, *dv;
};

int64_t rounded_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

Head head_of(const AttentionPass& pass, int64_t index) {
  const Attention& job = pass.job;
  const int64_t bytes = job.type == Element::f32 ? 4 : 2, width = job.heads * job.dim;
  const int64_t picture = index / job.heads, column = index % job.heads * job.dim;
  const int64_t from = (picture * job.tokens * 3 * width + column) * bytes, third = width * bytes;
  const int64_t out = (picture * job.tokens * width + column) * bytes;
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

// The loops of one instruction set, for float words or for words of two bf16.
struct Kernels {
  void (*forward)(const AttentionPass&, int64_t, int);
  void (*backward)(const AttentionPass&, int64_t, int);
  int64_t (*floats)(const AttentionPass&);
};

#define LF_KERNELS(isa, bf16) \
  Kernels { isa::forward_task<bf16>, isa::backward_task<bf16>, isa::room_floats<bf16> }

Kernels kernels_for(Element type, PairsIsa isa) {
#if defined(__x86_64__)
  isa = std::min(isa, best_pairs_isa());
  if (isa == PairsIsa::avx512_bf16 && type == Element::bf16) return LF_KERNELS(avx512_bf16, true);
  if (isa >= PairsIsa::avx512) return LF_KERNELS(avx512, false);
  if (isa == PairsIsa::avx2) return LF_KERNELS(avx2, false);
#endif
  return LF_KERNELS(scalar, false);
}

void run(AttentionPass& pass, int64_t most_rows, int threads, PairsIsa isa) {
  const Attention& job = pass.job;
  const int64_t heads = job.batch * job.heads;
  if (!heads || !job.tokens) return;
  threads = std::max(threads, 1);
  const Kernels kernels = kernels_for(job.type, isa);
  const int64_t blocks = (job.tokens + most_rows - 1) / most_rows;
  pass.block_rows = rounded_up((job.tokens + blocks - 1) / blocks, kMicroRows);
  pass.blocks = (job.tokens + pass.block_rows - 1) / pass.block_rows;
  pass.parts = 1;
  // Few heads: parts of them, each of which packs k and v anew.
  if (!pass.backward && heads < 2 * threads) pass.parts = std::min((2 * threads + heads - 1) / heads, pass.blocks);
  pass.scratch_stride = rounded_up(kernels.floats(pass), 1024) + 64;
  const int64_t tasks = heads * pass.parts;
  const Scratch scratch(pass.scratch_stride * std::min<int64_t>(threads, tasks) * sizeof(float));
  pass.scratch = scratch.get();
  parallel(tasks, threads, pass, pass.backward ? kernels.backward : kernels.forward);
}

}  // namespace

void attention_forward_cpu(const Attention& attention, void* out, float* lse, int threads, PairsIsa isa) {
  AttentionPass pass{};
  pass.job = attention;
  pass.out = static_cast<char*>(out);
  pass.lse_out = lse;
  run(pass, kForwardRows, threads, isa);
}

void attention_backward_cpu(const Attention& attention, const void* d_out, const float* lse, void* d_qkv, void* out,
                            int threads, PairsIsa isa) {
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
