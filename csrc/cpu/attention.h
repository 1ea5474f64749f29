// What the tensor side of attention (attention.cpp) hands to the loops (attention_forward.h, attention_backward.h).
#pragma once

#include <cstdint>

#include "cpu/dtypes.h"

namespace bertops {

// A (B, H, N, D) tensor, or the (B, H, N, N) map; strides in elements.
struct Heads {
  void* data = nullptr;
  DType dtype = DType::kFloat;
  int64_t batch_stride = 0, head_stride = 0, row_stride = 0, dim_stride = 0;
};

// The real rows of one sequence: row `begin + position[i]` of batch `batch`, i < count, positions ascending.
struct Sequence {
  const int32_t* position;
  int64_t count;
  int64_t batch;
  int64_t begin;
  int64_t length;    // rows that the sequence spans, real or not
  int64_t identity;  // which sequence it is to the dropout generator
  bool dense;        // every row is real
};

struct Attention {
  Heads q, k, v, out;
  void* lse;     // (B, H, N) contiguous, fp32 or fp64
  Heads scores;  // none: data is null
  int64_t heads, length, head_dim;
  int64_t window;  // -1: none
  double scale, dropout_p;
  uint64_t seed;
  uint64_t keep_from;  // a Philox word below this drops its probability
  // backward
  Heads grad_out, grad_scores, dq, dk, dv;
  const void* grad_lse;  // contiguous like lse, or null
};

// One unit of work: queries [first, last) of the real rows of a sequence, in one head.
struct AttentionTask {
  const Sequence* sequence;
  int64_t head;
  int64_t first, last;
  void* dk;  // backward: where this task sums (count padded, head_dim padded); null: in its own scratch
  void* dv;
};

constexpr int64_t kQueryBlock = 64;
constexpr int64_t kKeyBlock = 128;
constexpr int64_t kPadding = 16;  // rows and columns of scratch, a multiple of every vector length

inline int64_t padded(int64_t x) { return (x + kPadding - 1) / kPadding * kPadding; }

// Elements of scratch that a task over `count` rows needs.
inline int64_t attention_forward_scratch(int64_t count, int64_t head_dim) {
  const int64_t rows = padded(count), width = padded(head_dim);
  const int64_t queries = 3 * kQueryBlock * width, map = 2 * kKeyBlock * kQueryBlock;
  return 2 * rows * width + queries + map + 2 * kQueryBlock + kPadding * width;
}
inline int64_t attention_backward_scratch(int64_t count, int64_t head_dim) {
  const int64_t rows = padded(count), width = padded(head_dim);
  const int64_t queries = 6 * kQueryBlock * width, map = 4 * kKeyBlock * kQueryBlock;
  return 5 * rows * width + queries + map + 2 * kQueryBlock + kPadding * width;
}

}  // namespace bertops
