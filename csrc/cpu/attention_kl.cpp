// CPU kernels of attention_kl.
#include "cpu/divergence.h"
#include "cpu/pair_tensors.h"

namespace bertops {
namespace {

// Runs `p`, with both lse where the caller has them.
void run(Divergence& p, const Rows& rows, const Tensor& q_s, const std::optional<Tensor>& lse_s,
         const std::optional<Tensor>& lse_t) {
  STD_TORCH_CHECK(lse_s.has_value() == lse_t.has_value(), "bertops: lse_s and lse_t go together");
  if (!lse_s) return run_divergence(p, rows);
  const Tensor known_s = known_lse(*lse_s, q_s), known_t = known_lse(*lse_t, q_s);
  p.known_lse_s = known_s.data_ptr();
  p.known_lse_t = known_t.data_ptr();
  run_divergence(p, rows);
}

std::tuple<Tensor, Tensor, Tensor> attention_kl_fwd(const Tensor& q_s, const Tensor& k_s, const Tensor& q_t,
                                                    const Tensor& k_t, std::optional<Tensor> mask,
                                                    std::optional<Tensor> cu_seqlens, double scale_s,
                                                    double scale_t, std::optional<Tensor> lse_s,
                                                    std::optional<Tensor> lse_t) {
  Divergence p = pair_of<Divergence>(q_s, k_s, q_t, k_t, scale_s, scale_t);
  Tensor kl = new_rows(q_s), new_lse_s = new_rows(q_s), new_lse_t = new_rows(q_s);
  p.rows = kl.data_ptr();
  p.lse_s = new_lse_s.data_ptr();
  p.lse_t = new_lse_t.data_ptr();
  run(p, Rows(q_s, mask, cu_seqlens), q_s, lse_s, lse_t);
  return {kl, new_lse_s, new_lse_t};
}

std::tuple<Tensor, Tensor> attention_kl_bwd(const Tensor& grad_rows, const Tensor& q_s, const Tensor& k_s,
                                            const Tensor& q_t, const Tensor& k_t, std::optional<Tensor> mask,
                                            std::optional<Tensor> cu_seqlens, double scale_s, double scale_t,
                                            const Tensor& lse_s, const Tensor& lse_t) {
  Divergence p = pair_of<Divergence>(q_s, k_s, q_t, k_t, scale_s, scale_t);
  Tensor dq_s = rows_first(q_s), dk_s = rows_first(k_s);
  p.grad_rows = heads_of_rows(grad_rows);
  p.dq = heads_of(dq_s);
  p.dk = heads_of(dk_s);
  run(p, Rows(q_s, mask, cu_seqlens), q_s, lse_s, lse_t);
  return {dq_s, dk_s};
}

std::tuple<Tensor, Tensor, Tensor> attention_kl_with_grads(const Tensor& q_s, const Tensor& k_s,
                                                           const Tensor& q_t, const Tensor& k_t,
                                                           std::optional<Tensor> mask,
                                                           std::optional<Tensor> cu_seqlens, double scale_s,
                                                           double scale_t, std::optional<Tensor> lse_s,
                                                           std::optional<Tensor> lse_t) {
  Divergence p = pair_of<Divergence>(q_s, k_s, q_t, k_t, scale_s, scale_t);
  const ScalarType dtype = accumulator_dtype(q_s.scalar_type());
  Tensor kl = new_rows(q_s), dq_s = rows_first(q_s, dtype), dk_s = rows_first(k_s, dtype);
  p.rows = kl.data_ptr();
  p.dq = heads_of(dq_s);
  p.dk = heads_of(dk_s);
  run(p, Rows(q_s, mask, cu_seqlens), q_s, lse_s, lse_t);
  return {kl, dq_s, dk_s};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bertops, CPU, m) {
  m.impl("attention_kl_fwd", TORCH_BOX(&attention_kl_fwd));
  m.impl("attention_kl_bwd", TORCH_BOX(&attention_kl_bwd));
  m.impl("attention_kl_with_grads", TORCH_BOX(&attention_kl_with_grads));
}

}  // namespace bertops
