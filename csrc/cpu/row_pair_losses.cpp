// CPU kernels of cosine_loss, normalized_mse and feature_map_transfer.
#include "cpu/row_pair_tensors.h"

#define BERTOPS_PER_ISA "cpu/row_pair_losses_isa.h"
#include "cpu/foreach_isa.h"

namespace bertops {
namespace {

constexpr int64_t kDirectionStats = 3, kFeatureStats = 7;  // members of their structs

// Two rows in scratch, padded to full vectors.
int64_t scratch_of(const RowPairs& p) { return 2 * padded(p.width); }

template <bool kCosine>
std::tuple<Tensor, Tensor> direction_fwd(const Tensor& hidden_s, const Tensor& hidden_t,
                                         std::optional<Tensor> mask, double eps) {
  RowPairTensors pair(hidden_s, hidden_t, mask, eps);
  const RowPairs& p = pair.p;
  auto results = pair.new_rows(1, kDirectionStats);
  pair.run_rows(scratch_of(p), [&](int64_t first, int64_t last, void* scratch) {
    BERTOPS_DISPATCH(p.s.dtype, direction_rows, p, kCosine, first, last, scratch)
  });
  return results;
}

template <bool kCosine>
Tensor direction_bwd(const Tensor& grad_rows, const Tensor& hidden_s, const Tensor& hidden_t,
                     std::optional<Tensor> mask, double eps, const Tensor& stats) {
  RowPairTensors pair(hidden_s, hidden_t, mask, eps);
  const RowPairs& p = pair.p;
  Tensor grad = pair.new_grad(grad_rows, stats, 1, kDirectionStats);
  pair.run_rows(scratch_of(p), [&](int64_t first, int64_t last, void* scratch) {
    BERTOPS_DISPATCH(p.s.dtype, direction_grads, p, kCosine, first, last, scratch)
  });
  return grad;
}

std::tuple<Tensor, Tensor> feature_map_transfer_fwd(const Tensor& hidden_s, const Tensor& hidden_t,
                                                    std::optional<Tensor> mask, double eps) {
  RowPairTensors pair(hidden_s, hidden_t, mask, eps);
  const RowPairs& p = pair.p;
  auto results = pair.new_rows(3, kFeatureStats);
  pair.run_rows(scratch_of(p), [&](int64_t first, int64_t last, void* scratch) {
    BERTOPS_DISPATCH(p.s.dtype, feature_rows, p, first, last, scratch)
  });
  return results;
}

Tensor feature_map_transfer_bwd(const Tensor& grad_rows, const Tensor& hidden_s, const Tensor& hidden_t,
                                std::optional<Tensor> mask, double eps, const Tensor& stats) {
  RowPairTensors pair(hidden_s, hidden_t, mask, eps);
  const RowPairs& p = pair.p;
  Tensor grad = pair.new_grad(grad_rows, stats, 3, kFeatureStats);
  pair.run_rows(scratch_of(p), [&](int64_t first, int64_t last, void* scratch) {
    BERTOPS_DISPATCH(p.s.dtype, feature_grads, p, first, last, scratch)
  });
  return grad;
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
