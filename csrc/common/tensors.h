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
  const auto sizes = like.sizes();
  return torch::stable::transpose(torch::stable::new_empty(like, {sizes[0], sizes[2], sizes[1], sizes[3]}), 1, 2);
}

inline ScalarType accumulator_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

}  // namespace bertops
