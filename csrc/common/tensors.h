// Tensors of the stable ABI: what every op's wrapper needs.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

namespace bertops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// (B, H, N, D) over (B, N, H, D) memory: merging the heads of the result needs no copy.
inline Tensor rows_first(const Tensor& like) {
  const int64_t batch = like.size(0), heads = like.size(1), length = like.size(2), head_dim = like.size(3);
  const Tensor memory = torch::stable::new_empty(like, {batch, length, heads, head_dim});
  const int64_t sizes[] = {batch, heads, length, head_dim};
  const int64_t strides[] = {length * heads * head_dim, head_dim, heads * head_dim, 1};
  AtenTensorHandle view;  // without the dispatcher, which costs as much as a small kernel
  STD_TORCH_CHECK(aoti_torch__reinterpret_tensor(memory.get(), 4, sizes, strides, 0, &view) == AOTI_TORCH_SUCCESS,
                  "bertops: no view of a new tensor");
  return Tensor(view);
}

inline ScalarType accumulator_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

}  // namespace bertops
