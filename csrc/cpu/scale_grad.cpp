// A saved gradient times the factor that backward brings, rounded once to the dtype of its input.
#include "cpu/tasks.h"

#define BERTOPS_PER_ISA "cpu/scale_grad_isa.h"
#include "cpu/foreach_isa.h"

namespace bertops {
namespace {

constexpr int64_t kElementsPerTask = int64_t{1} << 16;

// `saved` is (B, H, N, D) over dense (B, N, H, D) memory, and so is the result.
Tensor scale_grad(const Tensor& saved, const Tensor& factor, ScalarType dtype) {
  const DType type = dtype_of(saved.scalar_type());
  STD_TORCH_CHECK(factor.numel() == 1 && factor.scalar_type() == saved.scalar_type(),
                  "bertops: factor must be one number in the dtype of losses");
  Tensor result = rows_first(saved, dtype);
  for (int64_t d = 0; d < 4; ++d) {
    STD_TORCH_CHECK(result.stride(d) == saved.stride(d),
                    "bertops: a saved gradient must be laid out by rows");
  }
  prefer_huge_pages(result);
  const Heads from{saved.data_ptr(), type}, to{result.data_ptr(), dtype_of(dtype)};
  const int64_t count = saved.numel(), tasks = (count + kElementsPerTask - 1) / kElementsPerTask;
  run_tasks(tasks, 0, [&](int64_t task, void*) {
    const int64_t first = task * kElementsPerTask, last = std::min(count, first + kElementsPerTask);
    BERTOPS_DISPATCH(type, scale_part, from, factor.data_ptr(), first, last, to)
  });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bertops, CPU, m) { m.impl("_scale_grad", TORCH_BOX(&scale_grad)); }

}  // namespace bertops
