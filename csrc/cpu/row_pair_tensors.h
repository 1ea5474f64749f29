// Tensors in and out of the losses between paired rows, and their run on the threads.
#pragma once

#include <tuple>

#include "cpu/row_pairs.h"
#include "cpu/tasks.h"

namespace bertops {

// The tensors behind a RowPairs: keeps what it points to.
struct RowPairTensors {
  Tensor s, t, rows, stats;
  std::optional<Tensor> mask;
  RowPairs p{};

  RowPairTensors(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& mask,
                 double option)
      : s(unit_last_stride(student)), t(unit_last_stride(teacher)), mask(mask) {
    STD_TORCH_CHECK(s.dim() == 3 && t.dim() == 3, "bertops: rows must have shape (B, N, H)");
    for (int64_t d = 0; d < 3; ++d) {
      STD_TORCH_CHECK(s.size(d) == t.size(d), "bertops: student and teacher must have one shape");
    }
    p.s = {s.data_ptr(), dtype_of(s.scalar_type()), s.stride(0), s.stride(1)};
    p.t = {t.data_ptr(), dtype_of(t.scalar_type()), t.stride(0), t.stride(1)};
    p.count = s.size(0) * s.size(1);
    p.length = s.size(1);
    p.width = s.size(2);
    p.option = option;
    if (mask) {
      STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool && mask->dim() == 2 &&
                          mask->size(0) == s.size(0) && mask->size(1) == s.size(1),
                      "bertops: mask must be bool of shape (B, N)");
      p.mask = static_cast<const bool*>(mask->data_ptr());
      p.mask_batch_stride = mask->stride(0);
      p.mask_row_stride = mask->stride(1);
    }
  }

  // Results of the forward: rows (losses, B, N) and stats (B, N, numbers).
  std::tuple<Tensor, Tensor> new_rows(int64_t losses, int64_t numbers) {
    const ScalarType dtype = accumulator_dtype(s.scalar_type());
    rows = torch::stable::new_empty(s, {losses, s.size(0), s.size(1)}, dtype);
    stats = torch::stable::new_empty(s, {s.size(0), s.size(1), numbers}, dtype);
    p.rows = rows.data_ptr();
    p.stats = stats.data_ptr();
    return {rows, stats};
  }

  // The result of the backward: (B, N, width), contiguous.
  Tensor new_grad(const Tensor& grad_rows, const Tensor& known_stats, int64_t losses, int64_t numbers) {
    const ScalarType dtype = accumulator_dtype(s.scalar_type());
    STD_TORCH_CHECK(grad_rows.dim() == 3 && grad_rows.size(0) == losses && grad_rows.size(1) == s.size(0) &&
                        grad_rows.size(2) == s.size(1) && grad_rows.scalar_type() == dtype,
                    "bertops: grad_rows must have an entry for every row, in the dtype of losses");
    STD_TORCH_CHECK(known_stats.numel() == p.count * numbers && known_stats.scalar_type() == dtype,
                    "bertops: stats must come from the forward");
    stats = torch::stable::contiguous(known_stats);
    p.stats = stats.data_ptr();
    rows = grad_rows;
    p.grad_rows = rows.data_ptr();
    p.grad_loss_stride = rows.stride(0);
    p.grad_batch_stride = rows.stride(1);
    p.grad_row_stride = rows.stride(2);
    Tensor grad = torch::stable::new_empty(s, {s.size(0), s.size(1), s.size(2)});
    prefer_huge_pages(grad);
    p.grad = grad.data_ptr();
    return grad;
  }

  // part(p, first row, last row, scratch of `scratch_elements` of the computation's type) on the threads.
  template <class Part>
  void run_rows(int64_t scratch_elements, const Part& part) const {
    // up to a huge page of the gradient: where two threads reach a fresh one at once, both clear it
    constexpr int64_t kFewest = int64_t{1} << 15, kMost = int64_t{1} << 19, kTasksPerThread = 4;
    if (p.count == 0) return;
    const int64_t share = p.count * p.width / (kTasksPerThread * torch::stable::get_num_threads());
    const int64_t step = std::max<int64_t>(1, std::clamp(share, kFewest, kMost) / p.width);
    run_tasks((p.count + step - 1) / step, scratch_elements * accumulator_bytes(p.s.dtype),
              [&](int64_t task, void* scratch) {
                part(p, task * step, std::min(p.count, (task + 1) * step), scratch);
              });
  }

 private:
  static Tensor unit_last_stride(const Tensor& x) {
    return x.dim() == 0 || x.stride(x.dim() - 1) == 1 ? x : torch::stable::contiguous(x);
  }
};

// The forward of `losses` losses: part(p, first row, last row, scratch) on the threads, with scratch for `kept`
// elements of both rows.
template <class Part>
std::tuple<Tensor, Tensor> row_pair_forward(const Tensor& student, const Tensor& teacher,
                                            const std::optional<Tensor>& mask, double option, int64_t losses,
                                            int64_t numbers, int64_t kept, const Part& part) {
  RowPairTensors pair(student, teacher, mask, option);
  auto results = pair.new_rows(losses, numbers);
  pair.run_rows(2 * padded(kept), part);
  return results;
}

// The backward from the numbers that the forward kept.
template <class Part>
Tensor row_pair_backward(const Tensor& grad_rows, const Tensor& student, const Tensor& teacher,
                         const std::optional<Tensor>& mask, double option, const Tensor& stats,
                         int64_t losses, int64_t numbers, int64_t kept, const Part& part) {
  RowPairTensors pair(student, teacher, mask, option);
  Tensor grad = pair.new_grad(grad_rows, stats, losses, numbers);
  pair.run_rows(2 * padded(kept), part);
  return grad;
}

}  // namespace bertops
