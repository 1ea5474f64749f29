// CPU kernels of relation_kl: attention_kl where the keys are the queries, with one gradient for both.
#include "cpu/divergence.h"
#include "cpu/pair_tensors.h"

namespace bertops {
namespace {

Divergence relation_of(const Tensor& x_s, const Tensor& x_t, double scale_s, double scale_t) {
  Divergence p = pair_of<Divergence>(x_s, x_s, x_t, x_t, scale_s, scale_t);
  p.self = true;
  return p;
}

std::tuple<Tensor, Tensor, Tensor> relation_kl_fwd(const Tensor& x_s, const Tensor& x_t,
                                                   std::optional<Tensor> mask,
                                                   std::optional<Tensor> cu_seqlens, double scale_s,
                                                   double scale_t) {
  Divergence p = relation_of(x_s, x_t, scale_s, scale_t);
  Tensor kl = new_rows(x_s), lse_s = new_rows(x_s), lse_t = new_rows(x_s);
  p.rows = kl.data_ptr();
  p.lse_s = lse_s.data_ptr();
  p.lse_t = lse_t.data_ptr();
  run_divergence(p, Rows(x_s, mask, cu_seqlens));
  return {kl, lse_s, lse_t};
}

Tensor relation_kl_bwd(const Tensor& grad_rows, const Tensor& x_s, const Tensor& x_t,
                       std::optional<Tensor> mask, std::optional<Tensor> cu_seqlens, double scale_s,
                       double scale_t, const Tensor& lse_s, const Tensor& lse_t) {
  Divergence p = relation_of(x_s, x_t, scale_s, scale_t);
  const Tensor known_s = known_lse(lse_s, x_s), known_t = known_lse(lse_t, x_s);
  Tensor dx_s = rows_first(x_s);
  p.known_lse_s = known_s.data_ptr();
  p.known_lse_t = known_t.data_ptr();
  p.grad_rows = heads_of_rows(grad_rows);
  p.dq = heads_of(dx_s);
  run_divergence(p, Rows(x_s, mask, cu_seqlens));
  return dx_s;
}

std::tuple<Tensor, Tensor> relation_kl_with_grads(const Tensor& x_s, const Tensor& x_t,
                                                  std::optional<Tensor> mask,
                                                  std::optional<Tensor> cu_seqlens, double scale_s,
                                                  double scale_t) {
  Divergence p = relation_of(x_s, x_t, scale_s, scale_t);
  Tensor kl = new_rows(x_s), dx_s = rows_first(x_s, accumulator_dtype(x_s.scalar_type()));
  p.rows = kl.data_ptr();
  p.dq = heads_of(dx_s);
  run_divergence(p, Rows(x_s, mask, cu_seqlens));
  return {kl, dx_s};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bertops, CPU, m) {
  m.impl("relation_kl_fwd", TORCH_BOX(&relation_kl_fwd));
  m.impl("relation_kl_bwd", TORCH_BOX(&relation_kl_bwd));
  m.impl("relation_kl_with_grads", TORCH_BOX(&relation_kl_with_grads));
}

}  // namespace bertops
