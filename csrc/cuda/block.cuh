// Sums over the threads of a warp and of a block. Every thread of the block takes part in every call.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace bertops {

constexpr int kWarp = 32;
constexpr int kMaxWarps = 32;  // of a block
constexpr int kMaxThreads = kWarp * kMaxWarps;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ int64_t warp_sum(int64_t value) {
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  return value;
}

struct Prefix {
  int64_t before, total;  // over threads before this one, over all
};

__device__ __forceinline__ Prefix block_prefix(int64_t value) {
  __shared__ int64_t sum_of_warp[kMaxWarps];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  int64_t sum = value;  // up to this lane
  for (int step = 1; step < kWarp; step *= 2) {
    const int64_t other = __shfl_up_sync(kAllLanes, sum, step);
    if (lane >= step) sum += other;
  }
  __syncthreads();  // the sums of the call before have been read
  if (lane == kWarp - 1) sum_of_warp[warp] = sum;
  __syncthreads();
  const int64_t other = lane < warps ? sum_of_warp[lane] : 0;
  return {warp_sum(lane < warp ? other : 0) + sum - value, warp_sum(other)};
}

}  // namespace bertops
