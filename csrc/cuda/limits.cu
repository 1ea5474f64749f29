// Kernels that measure what the GPU can do at most; the bench prints every kernel's share of it.
#include <cstdint>
#include <tuple>

#include "cuda/launch.cuh"

namespace bertops {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerSm = 8;  // 2048 threads, all that an SM holds
constexpr int kChains = 4;

// ---- CUDA kernels

// `steps` ex2 on each of kChains values a thread: MUFU.EX2, what exp2f and Triton's exp2 become.
__global__ void exp_kernel(int64_t steps, float* sums) {
  float x[kChains];
  for (int i = 0; i < kChains; ++i) x[i] = -0.001f * static_cast<float>(threadIdx.x + i);
  for (int64_t step = 0; step < steps; ++step) {
#pragma unroll
    for (int i = 0; i < kChains; ++i) asm volatile("ex2.approx.ftz.f32 %0, %0;" : "+f"(x[i]));
  }
  float sum = 0;
  for (int i = 0; i < kChains; ++i) sum += x[i];
  sums[static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x] = sum;
}

__global__ void empty_kernel() {}

// ---- kernel launchers

// A sum a thread, so that nothing is optimised away, and the number of exponentials.
std::tuple<Tensor, int64_t> limits_exp(const Tensor& like, int64_t steps) {
  const DeviceGuard guard(like.get_device_index());
  const int64_t blocks = multiprocessors("_limits_exp", like) * kBlocksPerSm;
  Tensor sums = torch::stable::new_empty(like, {blocks * kThreads}, ScalarType::Float);
  launch("_limits_exp", like, {blocks, kThreads}, exp_kernel, steps, static_cast<float*>(sums.data_ptr()));
  return {sums, blocks * kThreads * kChains * steps};
}

void limits_launch(const Tensor& like) {
  const DeviceGuard guard(like.get_device_index());
  launch("_limits_launch", like, {1, 1}, empty_kernel);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bertops, CUDA, m) {
  m.impl("_limits_exp", TORCH_BOX(&limits_exp));
  m.impl("_limits_launch", TORCH_BOX(&limits_launch));
}

}  // namespace bertops
