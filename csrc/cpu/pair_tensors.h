// Tensors in and out of the losses between two models' attention.
#pragma once

#include "cpu/tasks.h"

namespace bertops {

inline void check_scores(const Tensor& q, const Tensor& k) {
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4, "bertops: queries and keys must have shape (B, H, N, D)");
  STD_TORCH_CHECK(q.scalar_type() == k.scalar_type(), "bertops: q and k of a model must have one dtype");
  for (int64_t d = 0; d < 4; ++d) {
    STD_TORCH_CHECK(q.size(d) == k.size(d), "bertops: q and k of a model must have one shape");
  }
}

// A `Loss` between the two, without its results.
template <class Loss>
Loss pair_of(const Tensor& q_s, const Tensor& k_s, const Tensor& q_t, const Tensor& k_t, double scale_s,
             double scale_t) {
  check_scores(q_s, k_s);
  check_scores(q_t, k_t);
  for (int64_t d = 0; d < 3; ++d) {
    STD_TORCH_CHECK(q_s.size(d) == q_t.size(d), "bertops: student and teacher must have one (B, H, N)");
  }
  Loss p{};
  p.q_s = heads_of(q_s);
  p.k_s = heads_of(k_s);
  p.q_t = heads_of(q_t);
  p.k_t = heads_of(k_t);
  p.heads = q_s.size(1);
  p.length = q_s.size(2);
  p.head_dim_s = q_s.size(3);
  p.head_dim_t = q_t.size(3);
  p.scale_s = scale_s;
  p.scale_t = scale_t;
  return p;
}

// (B, H, N), contiguous, in the dtype of losses.
inline Tensor new_rows(const Tensor& x) {
  return torch::stable::new_empty(x, {x.size(0), x.size(1), x.size(2)}, accumulator_dtype(x.scalar_type()));
}

inline Heads heads_of_rows(const Tensor& x) {
  return {x.data_ptr(), dtype_of(x.scalar_type()), x.stride(0), x.stride(1), x.stride(2), 1};
}

// An lse, contiguous: the caller keeps what this returns while the kernel runs.
inline Tensor known_lse(const Tensor& lse, const Tensor& q_s) {
  STD_TORCH_CHECK(lse.dim() == 3 && lse.scalar_type() == accumulator_dtype(q_s.scalar_type()) &&
                      lse.size(0) == q_s.size(0) && lse.size(1) == q_s.size(1) && lse.size(2) == q_s.size(2),
                  "bertops: lse must be (B, H, N) in the dtype of losses");
  return torch::stable::contiguous(lse);
}

}  // namespace bertops
