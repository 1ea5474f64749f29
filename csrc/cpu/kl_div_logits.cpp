// CPU kernels of kl_div_logits.
#include "cpu/row_pair_tensors.h"

namespace bertops {

constexpr int64_t kClassBlock = 2048;  // classes of both models that stay in the first cache

}  // namespace bertops

#define BERTOPS_PER_ISA "cpu/kl_div_logits_isa.h"
#include "cpu/foreach_isa.h"

namespace bertops {
namespace {

constexpr int64_t kStats = 5;  // members of KlStats

std::tuple<Tensor, Tensor> kl_div_logits_fwd(const Tensor& logits_s, const Tensor& logits_t,
                                             std::optional<Tensor> mask, double temperature) {
  return row_pair_forward(logits_s, logits_t, mask, temperature, 1, kStats, kClassBlock,
                          [](const RowPairs& p, int64_t first, int64_t last, void* scratch) {
                            BERTOPS_DISPATCH(p.s.dtype, kl_rows, p, first, last, scratch)
                          });
}

Tensor kl_div_logits_bwd(const Tensor& grad_rows, const Tensor& logits_s, const Tensor& logits_t,
                         std::optional<Tensor> mask, double temperature, const Tensor& stats) {
  return row_pair_backward(grad_rows, logits_s, logits_t, mask, temperature, stats, 1, kStats, kClassBlock,
                           [](const RowPairs& p, int64_t first, int64_t last, void* scratch) {
                             BERTOPS_DISPATCH(p.s.dtype, kl_grads, p, first, last, scratch)
                           });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bertops, CPU, m) {
  m.impl("kl_div_logits_fwd", TORCH_BOX(&kl_div_logits_fwd));
  m.impl("kl_div_logits_bwd", TORCH_BOX(&kl_div_logits_bwd));
}

}  // namespace bertops
