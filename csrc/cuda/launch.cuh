// What the host side of every CUDA op needs: device, stream, errors, launches.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <utility>

#include "common/tensors.h"

namespace bertops {

using torch::stable::accelerator::DeviceGuard;

inline void check_cuda(const char* op, cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or PyTorch would report it again, for an op of its own
  STD_TORCH_CHECK(false, "bertops: ", op, ": ", cudaGetErrorString(error));
}

inline cudaStream_t current_stream(const Tensor& like) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline int64_t multiprocessors(const char* op, const Tensor& like) {
  int count = 0;
  check_cuda(op, cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, like.get_device_index()));
  return count;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Grid {
  int64_t blocks;  // no more than a grid holds are launched: kernels stride over blocks
  int threads;
  bool together = false;  // all at once, so that they can wait for each other
};

// Launches on the current stream of the device of `like`. The caller holds a DeviceGuard.
template <class... Parameters, class... Arguments>
void launch(const char* op, const Tensor& like, const Grid& grid, void (*kernel)(Parameters...),
            Arguments&&... arguments) {
  cudaLaunchAttribute together{};
  together.id = cudaLaunchAttributeCooperative;
  together.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(std::min<int64_t>(grid.blocks, std::numeric_limits<int32_t>::max()));
  config.blockDim = static_cast<unsigned>(grid.threads);
  config.stream = current_stream(like);
  config.attrs = &together;
  config.numAttrs = grid.together ? 1 : 0;
  check_cuda(op, cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...));
}

}  // namespace bertops
