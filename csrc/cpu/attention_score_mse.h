// TinyBERT's attention loss: what attention_score_mse.cpp hands to the loops in attention_score_mse_loops.h.
//
// With A and B the scores of student and teacher, A - B = P R^T for P and R of D_s + D_t columns. In general
//   P = [a, -b]  R = [K_s, K_t]                                with a = scale_s Q_s, b = scale_t Q_t,
// and where the head dims agree
//   P = [a - b, (a + b) / 2]  R = [(K_s + K_t) / 2, K_s - K_t]:
// all terms of |A - B|^2 then shrink with the distance between the models, and nothing cancels.
#pragma once

#include "cpu/heads.h"

namespace bertops {

struct ScoreMSE {
  Heads q_s, k_s, q_t, k_t;
  int64_t heads, length, head_dim_s, head_dim_t;
  double scale_s, scale_t;
  // direct form
  void* rows;       // (B, H, N) contiguous, in the type of the computation, or null
  Heads grad_rows;  // (B, H, N); null data: ones
  // Gram form
  void* sums;        // (sequences, H) contiguous
  void* grams;       // (sequences, H, 2, D_s + D_t, D_s + D_t) contiguous: P^T P and R^T R
  const void* grad;  // one number; of gram_grad_task
  Heads dq, dk;      // null data: no gradient
};

inline bool same_head_dim(const ScoreMSE& p) { return p.head_dim_s == p.head_dim_t; }
inline int64_t pair_dim(const ScoreMSE& p) { return p.head_dim_s + p.head_dim_t; }

// Sums of a Gram in three steps, and products with it in two: long running sums lose digits that a row of A - B, with
// its many independent errors, keeps.
constexpr int64_t kGramBlock = 32;          // rows of P and R in scratch, and columns of a product
constexpr int64_t kGramPart = 256;          // rows that join a Gram together
constexpr int64_t kRowsPerGramTask = 1024;  // fixed: sums must not depend on the number of threads

// Elements of scratch that a task over `count` rows needs.
inline int64_t direct_scratch(const ScoreMSE& p, int64_t count) {
  const int64_t rows = padded(count), width = padded(pair_dim(p)), width_s = padded(p.head_dim_s);
  const int64_t queries = 2 * kQueryBlock * (width + width_s + 1), tile = kKeyBlock * kQueryBlock;
  return rows * (width + 2 * width_s) + queries + tile + kPadding * width;
}
inline int64_t gram_scratch(const ScoreMSE& p) {
  const int64_t width = padded(pair_dim(p));
  return 2 * kGramBlock * width + 4 * width * width;
}
inline int64_t gram_grad_scratch(const ScoreMSE& p) {
  const int64_t width = padded(pair_dim(p)), width_s = padded(p.head_dim_s);
  return 2 * width * width_s + 2 * kPadding * width + kPadding * width_s;
}
inline int64_t gram_with_grads_scratch(const ScoreMSE& p) {
  const int64_t width = padded(pair_dim(p));
  return 4 * width * width + gram_scratch(p) + gram_grad_scratch(p);
}

}  // namespace bertops
