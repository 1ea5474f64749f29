// Paired rows of a student and of a teacher: what the losses between them (row_pair_losses.cpp, kl_div_logits.cpp)
// hand to their loops, once per instruction set.
#pragma once

#include <cstdint>

#include "cpu/dtypes.h"

namespace bertops {

// Rows (B, N, width) with a last stride of 1; strides in elements.
struct RowsOf {
  const void* data;
  DType dtype;
  int64_t batch_stride, row_stride;
};

struct RowPairs {
  RowsOf s, t;
  const bool* mask;  // (B, N) or null
  int64_t mask_batch_stride, mask_row_stride;
  int64_t count, length, width;  // B * N, N, elements of a row
  double option;                 // the number that the op takes
  void* rows;                    // (losses, B * N) in the type of the computation
  void* stats;                   // (B * N, numbers), written by the forward, read by the backward
  const void* grad_rows;         // (losses, B, N); null in the forward
  int64_t grad_loss_stride, grad_batch_stride, grad_row_stride;
  void* grad;  // (B * N, width), in the dtype of s

  bool real(int64_t row) const {
    return mask == nullptr || mask[row / length * mask_batch_stride + row % length * mask_row_stride];
  }
  int64_t offset(const RowsOf& x, int64_t row) const {
    return row / length * x.batch_stride + row % length * x.row_stride;
  }
  int64_t grad_offset(int64_t loss, int64_t row) const {
    return loss * grad_loss_stride + row / length * grad_batch_stride + row % length * grad_row_stride;
  }
};

}  // namespace bertops
