// Tensors of the stable ABI: what every op's wrapper needs.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cstdint>
#include <optional>

namespace bertops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// (B, H, N, D) over (B, N, H, D) memory: merging the heads of the result needs no copy.
inline Tensor rows_first(const Tensor& like, std::optional<ScalarType> dtype = std::nullopt) {
  const int64_t batch = like.size(0), heads = like.size(1), length = like.size(2), head_dim = like.size(3);
  const Tensor memory = torch::stable::new_empty(like, {batch, length, heads, head_dim}, dtype);
  const int64_t sizes[] = {batch, heads, length, head_dim};
  const int64_t strides[] = {length * heads * head_dim, head_dim, heads * head_dim, 1};
  AtenTensorHandle view;  // without the dispatcher, which costs as much as a small kernel
  STD_TORCH_CHECK(
      aoti_torch__reinterpret_tensor(memory.get(), 4, sizes, strides, 0, &view) == AOTI_TORCH_SUCCESS,
      "bertops: no view of a new tensor");
  return Tensor(view);
}

// Memory that the caller is about to fill: where the kernel gives huge pages on request only, faulting 4 KiB at a
// time costs more than writing. Does nothing to small tensors.
inline void prefer_huge_pages(const Tensor& fresh) {
#ifdef __linux__
  constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
  const uintptr_t first = reinterpret_cast<uintptr_t>(fresh.data_ptr());
  const uintptr_t last = first + fresh.numel() * fresh.element_size();
  const uintptr_t begin = (first + kHugePage - 1) / kHugePage * kHugePage, end = last / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

inline ScalarType accumulator_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

}  // namespace bertops
