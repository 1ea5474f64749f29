// Element types of floating-point tensors on a GPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "cuda/launch.cuh"

namespace bertops {

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (sizeof(T) == sizeof(float)) return x;
  if constexpr (std::is_same_v<T, __half>) return __float2half_rn(x);
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return __float2bfloat16_rn(x);
}

// Calls run(T()) with the element type; `name` is the argument's.
template <class Run>
void with_float_type(const char* name, ScalarType dtype, const Run& run) {
  switch (dtype) {
    case ScalarType::Float: return run(float());
    case ScalarType::Half: return run(__half());
    case ScalarType::BFloat16: return run(__nv_bfloat16());
    default: STD_TORCH_CHECK(false, "bertops: ", name, " must be float32, bfloat16 or float16 on a GPU");
  }
}

}  // namespace bertops
