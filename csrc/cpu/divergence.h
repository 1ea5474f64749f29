// KL between the attention of a student and a teacher: what attention_kl.cpp and relation_kl.cpp hand to the loops in
// divergence_loops.h.
#pragma once

#include "cpu/heads.h"

namespace bertops {

struct Rows;

struct Divergence {
  Heads q_s, k_s, q_t, k_t;
  bool self;  // k is q in both models, and dq holds the gradient of both
  int64_t heads, length, head_dim_s, head_dim_t;
  double scale_s, scale_t;
  // (B, H, N) contiguous, in the type of the computation, or null
  void* rows;
  void* lse_s;
  void* lse_t;
  const void* known_lse_s;
  const void* known_lse_t;
  Heads grad_rows;  // (B, H, N); null data: ones
  Heads dq, dk;     // null data: no gradient
};

// Elements of scratch that a task over `count` rows needs.
inline int64_t divergence_scratch(const Divergence& p, int64_t count) {
  const int64_t rows = padded(count), width_s = padded(p.head_dim_s), width_t = padded(p.head_dim_t);
  const int64_t keys = rows * (3 * width_s + width_t), scores = 2 * rows * kQueryBlock;
  const int64_t queries = 3 * kQueryBlock * width_s + 2 * kQueryBlock * width_t;
  return keys + scores + queries + 9 * kQueryBlock + kPadding * (width_s + width_t);
}

// Runs `p` on the threads.
void run_divergence(const Divergence& p, const Rows& rows);

}  // namespace bertops
