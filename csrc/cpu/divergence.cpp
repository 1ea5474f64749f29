// Runs KL between two models' attention. The loops are in divergence_loops.h.
#include "cpu/divergence.h"

#include "cpu/tasks.h"

#define BERTOPS_PER_ISA "cpu/divergence_isa.h"
#include "cpu/foreach_isa.h"

namespace bertops {

void run_divergence(const Divergence& p, const Rows& rows) {
  const bool with_grads = p.dq.data != nullptr;
  const DType dtype = p.q_s.dtype;
  std::vector<HeadTask> tasks = loss_tasks_of(rows, p.heads, with_grads);
  const int64_t row_bytes = with_grads ? padded(p.head_dim_s) * accumulator_bytes(dtype) : 0;
  const PartialSums sums(tasks, [&](int64_t count) { return padded(count) * row_bytes; });
  const int64_t bytes = divergence_scratch(p, rows.longest) * accumulator_bytes(dtype);
  run_tasks(tasks.size(), bytes, [&](int64_t task, void* scratch) {
    BERTOPS_DISPATCH(dtype, divergence_task, p, tasks[task], scratch)
  });
  sums.reduce([&](const HeadTask* parts, int64_t count) {
    BERTOPS_DISPATCH(dtype, divergence_reduce, p, parts, count)
  });
}

}  // namespace bertops
