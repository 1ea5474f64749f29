// The entropy of every row of a batch of logits, and its gradient.
#include "cpu/entropy.h"

#include <cmath>

#define BERTOPS_PER_ISA "cpu/entropy_isa.h"
#include "cpu/foreach_isa.h"

namespace bertops {

EntropyRows::EntropyRows(const Tensor& logits, bool normalize, bool bounded)
    : logits(logits.data_ptr()),
      dtype(dtype_of(logits.scalar_type())),
      rows(logits.size(0)),
      classes(logits.size(1)),
      row_stride(logits.stride(0)),
      stride(logits.stride(1)),
      unit(normalize && classes > 1 ? 1 / std::log(static_cast<double>(classes)) : 1),
      bounded(bounded) {}

double EntropyRows::largest() const { return std::log(static_cast<double>(classes)) * unit; }

void entropy_rows(const EntropyRows& p) {
  constexpr int64_t kElementsPerTask = int64_t{1} << 14, kRowsTogether = 64;
  if (p.rows == 0) return;
  const int64_t wanted = std::max<int64_t>(1, kElementsPerTask / p.classes);
  const int64_t rows_per_task = (wanted + kRowsTogether - 1) / kRowsTogether * kRowsTogether;
  const int64_t step = p.classes > kElementsPerTask / kRowsTogether ? wanted : rows_per_task;
  const int64_t tasks = (p.rows + step - 1) / step;
  const int64_t scratch_bytes = std::max<int64_t>(p.classes + 16, 64 * 16) * accumulator_bytes(p.dtype);
  run_tasks(tasks, scratch_bytes, [&](int64_t task, void* scratch) {
    const int64_t first = task * step, last = std::min(p.rows, first + step);
    BERTOPS_DISPATCH(p.dtype, entropy_part, p, first, last, scratch)
  });
}

namespace {

Tensor entropy_fwd(const Tensor& logits, bool normalize) {
  EntropyRows p(logits, normalize, false);
  Tensor entropy = torch::stable::new_empty(logits, {p.rows}, accumulator_dtype(logits.scalar_type()));
  p.entropy = entropy.data_ptr();
  entropy_rows(p);
  return entropy;
}

Tensor entropy_bwd(const Tensor& grad, const Tensor& logits, bool normalize) {
  EntropyRows p(logits, normalize, false);
  STD_TORCH_CHECK(grad.dim() == 1 && grad.size(0) == p.rows &&
                      grad.scalar_type() == accumulator_dtype(logits.scalar_type()),
                  "bertops: grad must have an entry for every row, in the dtype of entropies");
  Tensor grad_logits = torch::stable::new_empty(logits, {p.rows, p.classes});
  p.grad = grad.data_ptr();
  p.grad_stride = grad.stride(0);
  p.grad_logits = grad_logits.data_ptr();
  entropy_rows(p);
  return grad_logits;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bertops, CPU, m) {
  m.impl("entropy_fwd", TORCH_BOX(&entropy_fwd));
  m.impl("entropy_bwd", TORCH_BOX(&entropy_bwd));
}

}  // namespace bertops
