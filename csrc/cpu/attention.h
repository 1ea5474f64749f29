// What the tensor side of attention (attention.cpp) hands to the loops (attention_forward.h, attention_backward.h).
#pragma once

#include "cpu/heads.h"

namespace bertops {

struct Attention {
  Heads q, k, v, out;
  void* lse;     // (B, H, N) contiguous, fp32 or fp64
  Heads scores;  // none: data is null
  int64_t heads, length, head_dim;
  int64_t window;  // -1: none
  double scale, dropout_p;
  uint64_t seed;
  uint64_t keep_from;  // a Philox word below this drops its probability
  // backward; a task's sums are dK and then dV, each (count padded, head_dim padded)
  Heads grad_out, grad_scores, dq, dk, dv;
  const void* grad_lse;  // contiguous like lse, or null
};

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
