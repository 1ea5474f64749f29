// Which rows of a batch are certain enough, and the order that moves the others together: one launch.
#include <cooperative_groups.h>

#include <tuple>

#include "cuda/entropy_rows.cuh"

namespace bertops {
namespace {

// ---- CUDA kernel

struct Decisions {
  int64_t* prediction;
  float* uncertainty;
  bool* exited;
  int64_t* order;
  int64_t* num_kept;
};

// Block b decides about rows [b * rows_of_block, ...) and counts those that stay. Once all have, each knows the place
// of its first row, and moves on through its rows in their order. `kept_of_block` is for more than one block.
template <class T>
__global__ void __launch_bounds__(kMaxThreads)
    exit_decision_kernel(LogitRows logits, float threshold, int64_t rows_of_block, Decisions to,
                         int64_t* kept_of_block) {
  const int64_t begin = blockIdx.x * rows_of_block;
  const int64_t end = begin + rows_of_block < logits.rows ? begin + rows_of_block : logits.rows;
  int64_t total = 0;
  for (int64_t first = begin; first < end; first += blockDim.x / logits.lanes) {
    const int64_t row = first + threadIdx.x / logits.lanes;
    const RowSums sums = row_sums<T>(logits, row);
    const float nats = cuda::entropy_of(sums.largest, sums.rest, sums.weighted);
    const float uncertainty = cuda::uncertainty_of(nats, logits.unit, logits.top);
    const bool exits = uncertainty <= threshold;
    const bool writes = row < end && threadIdx.x % logits.lanes == 0;
    if (writes) {
      to.prediction[row] = sums.index;
      to.uncertainty[row] = uncertainty;
      to.exited[row] = exits;
    }
    total += __syncthreads_count(writes && !exits);
  }

  int64_t before = 0;
  if (gridDim.x > 1) {
    if (threadIdx.x == 0) kept_of_block[blockIdx.x] = total;
    cooperative_groups::this_grid().sync();
    total = 0;
    for (unsigned block = threadIdx.x % kWarp; block < gridDim.x; block += kWarp) {
      total += kept_of_block[block];
      before += block < blockIdx.x ? kept_of_block[block] : 0;
    }
    total = warp_sum(total);
    before = warp_sum(before);
  }

  for (int64_t first = begin; first < end; first += blockDim.x) {
    const int64_t row = first + threadIdx.x;
    const bool stays = row < end && !to.exited[row];
    const Prefix kept = block_prefix(stays);
    const int64_t kept_before = before + kept.before;
    if (row < end) to.order[stays ? kept_before : total + row - kept_before] = row;
    before += kept.total;
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) *to.num_kept = total;
}

// ---- kernel launcher

// Waiting for other blocks costs more than a few rounds of one.
constexpr int64_t kRoundsOfOneBlock = 4;

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> exit_decision(const Tensor& logits, double threshold,
                                                                 bool normalize) {
  const DeviceGuard guard(logits.get_device_index());
  const LogitRows p = logit_rows(logits, normalize);
  Tensor prediction = torch::stable::new_empty(logits, {p.rows}, ScalarType::Long);
  Tensor uncertainty = torch::stable::new_empty(logits, {p.rows}, ScalarType::Float);
  Tensor exited = torch::stable::new_empty(logits, {p.rows}, ScalarType::Bool);
  Tensor order = torch::stable::new_empty(logits, {p.rows}, ScalarType::Long);
  Tensor num_kept = torch::stable::new_empty(logits, {}, ScalarType::Long);

  // One block of any size fits a multiprocessor, so that all run at once.
  const int64_t rounds = ceil_div(p.rows, kMaxThreads / p.lanes);
  const bool one_block = rounds <= (p.lanes > kWarp ? 1 : kRoundsOfOneBlock);
  const int64_t most = one_block ? 1 : std::min(rounds, multiprocessors("exit_decision", logits));
  const int64_t rows_of_block = std::max<int64_t>(1, ceil_div(p.rows, most));
  const int64_t blocks = std::max<int64_t>(1, ceil_div(p.rows, rows_of_block));
  Tensor kept_of_block = torch::stable::new_empty(logits, {blocks > 1 ? blocks : 0}, ScalarType::Long);

  const Decisions to{static_cast<int64_t*>(prediction.data_ptr()),
                     static_cast<float*>(uncertainty.data_ptr()), static_cast<bool*>(exited.data_ptr()),
                     static_cast<int64_t*>(order.data_ptr()), static_cast<int64_t*>(num_kept.data_ptr())};
  with_float_type("logits", logits.scalar_type(), [&](auto zero) {
    launch("exit_decision", logits, {blocks, kMaxThreads, blocks > 1}, exit_decision_kernel<decltype(zero)>,
           p, static_cast<float>(threshold), rows_of_block, to,
           static_cast<int64_t*>(kept_of_block.data_ptr()));
  });
  return {prediction, uncertainty, exited, order, num_kept};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bertops, CUDA, m) { m.impl("exit_decision", TORCH_BOX(&exit_decision)); }

}  // namespace bertops
