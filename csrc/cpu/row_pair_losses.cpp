// CPU kernels of cosine_loss, normalized_mse and feature_map_transfer.
#include "cpu/row_pair_tensors.h"

#define BERTOPS_PER_ISA "cpu/row_pair_losses_isa.h"
#include "cpu/foreach_isa.h"

namespace bertops {
namespace {

constexpr int64_t kDirectionStats = 3, kFeatureStats = 7;  // members of their structs

template <bool kCosine>
std::tuple<Tensor, Tensor> direction_fwd(const Tensor& hidden_s, const Tensor& hidden_t,
                                         std::optional<Tensor> mask, double eps) {
  return row_pair_forward(hidden_s, hidden_t, mask, eps, 1, kDirectionStats, hidden_s.size(2),
                          [](const RowPairs& p, int64_t first, int64_t last, void* scratch) {
                            BERTOPS_DISPATCH(p.s.dtype, direction_rows, p, kCosine, first, last, scratch)
                          });
}

template <bool kCosine>
Tensor direction_bwd(const Tensor& grad_rows, const Tensor& hidden_s, const Tensor& hidden_t,
                     std::optional<Tensor> mask, double eps, const Tensor& stats) {
  return row_pair_backward(grad_rows, hidden_s, hidden_t, mask, eps, stats, 1, kDirectionStats,
                           hidden_s.size(2),
                           [](const RowPairs& p, int64_t first, int64_t last, void* scratch) {
                             BERTOPS_DISPATCH(p.s.dtype, direction_grads, p, kCosine, first, last, scratch)
                           });
}

std::tuple<Tensor, Tensor> feature_map_transfer_fwd(const Tensor& hidden_s, const Tensor& hidden_t,
                                                    std::optional<Tensor> mask, double eps) {
  return row_pair_forward(hidden_s, hidden_t, mask, eps, 3, kFeatureStats, hidden_s.size(2),
                          [](const RowPairs& p, int64_t first, int64_t last, void* scratch) {
                            BERTOPS_DISPATCH(p.s.dtype, feature_rows, p, first, last, scratch)
                          });
}

Tensor feature_map_transfer_bwd(const Tensor& grad_rows, const Tensor& hidden_s, const Tensor& hidden_t,
                                std::optional<Tensor> mask, double eps, const Tensor& stats) {
  return row_pair_backward(grad_rows, hidden_s, hidden_t, mask, eps, stats, 3, kFeatureStats,
                           hidden_s.size(2),
                           [](const RowPairs& p, int64_t first, int64_t last, void* scratch) {
                             BERTOPS_DISPATCH(p.s.dtype, feature_grads, p, first, last, scratch)
                           });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bertops, CPU, m) {
  m.impl("cosine_loss_fwd", TORCH_BOX(&direction_fwd<true>));
  m.impl("cosine_loss_bwd", TORCH_BOX(&direction_bwd<true>));
  m.impl("normalized_mse_fwd", TORCH_BOX(&direction_fwd<false>));
  m.impl("normalized_mse_bwd", TORCH_BOX(&direction_bwd<false>));
  m.impl("feature_map_transfer_fwd", TORCH_BOX(&feature_map_transfer_fwd));
  m.impl("feature_map_transfer_bwd", TORCH_BOX(&feature_map_transfer_bwd));
}

}  // namespace bertops
