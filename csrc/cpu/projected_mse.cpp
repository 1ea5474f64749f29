// CPU kernels of projected_mse. The loops are in projected_mse_loops.h.
#include "cpu/projected_mse.h"

#define BERTOPS_PER_ISA "cpu/projected_mse_isa.h"
#include "cpu/foreach_isa.h"

namespace bertops {
namespace {

constexpr int64_t kDifferenceBytes = int64_t{8} << 20;  // of a chunk
constexpr int64_t kTokensPerTask = 64;                  // without a projection

// Memory for chunks of `tokens`, in elements of `size` bytes.
Workspace take_memory(ProjectedMSE& p, int64_t tokens, int64_t size) {
  const int64_t outputs = padded(p.student.outputs), tasks = (outputs + kOutputBlock - 1) / kOutputBlock;
  const int64_t width = rounded(p.student.width, kPanelPadding);
  Workspace memory(tokens * (3 * width + outputs + tasks + 1) * size + 8 * 64);
  p.columns = memory.take(tokens * width, size);
  p.token_rows = memory.take(tokens * width, size);
  p.differences = memory.take(tokens * outputs, size);
  p.squares = memory.take(tokens * tasks, size);
  p.factors = memory.take(tokens, size);
  p.sums = memory.take(tokens * width, size);
  return memory;
}

void run_projected(ProjectedMSE& p, const std::vector<int64_t>& tokens) {
  const DType dtype = p.student.hidden.dtype;
  const int64_t size = accumulator_bytes(dtype), threads = torch::stable::get_num_threads();
  const int64_t count = static_cast<int64_t>(tokens.size()), width = p.student.width;
  const int64_t step = chunk_tokens(count, padded(p.student.outputs) * size, kDifferenceBytes);
  const Workspace memory = take_memory(p, step, size);
  const int64_t scratch_bytes = (output_scratch(width) + 2 * kPanelPadding * kOutputBlock) * size;
  for (int64_t first = 0; first < count; first += step) {
    const int64_t some = std::min(step, count - first);
    const Chunk chunk{tokens.data() + first, some, (some + kQueryBlock - 1) / kQueryBlock, first == 0};
    run_tasks(chunk.blocks, pack_scratch(width) * size, [&](int64_t block, void* scratch) {
      BERTOPS_DISPATCH(dtype, projection_pack, p, chunk, block, scratch)
    });
    const OutputTasks outputs(p.student.outputs, chunk.blocks, threads);
    run_tasks(outputs.count(), scratch_bytes, [&](int64_t task, void* scratch) {
      BERTOPS_DISPATCH(dtype, projection_differences, p, chunk, outputs.block(task), outputs.from(task),
                       outputs.to(task), scratch)
    });
    run_tasks(chunk.blocks, 0,
              [&](int64_t block, void*) { BERTOPS_DISPATCH(dtype, projection_rows, p, chunk, block) });
    if (p.grad_rows.data == nullptr) continue;
    const GradTasks grads(p.student, p.grads, chunk.blocks, threads);
    run_tasks(grads.count(), grad_scratch() * size, [&](int64_t task, void* scratch) {
      if (task < grads.hidden.count()) {
        BERTOPS_DISPATCH(dtype, projection_hidden_grads, p, chunk, grads.hidden.from(task),
                         grads.hidden.to(task), grads.hidden.first(task), grads.hidden.last(task), scratch)
      } else {
        BERTOPS_DISPATCH(dtype, projection_weight_grads, p, chunk, task - grads.hidden.count(), scratch)
      }
    });
  }
}

void run_plain(const ProjectedMSE& p, const std::vector<int64_t>& tokens) {
  const DType dtype = p.student.hidden.dtype;
  const int64_t count = static_cast<int64_t>(tokens.size());
  const int64_t bytes = 2 * padded(p.student.width) * accumulator_bytes(dtype);
  run_tasks((count + kTokensPerTask - 1) / kTokensPerTask, bytes, [&](int64_t task, void* scratch) {
    const int64_t first = task * kTokensPerTask, last = std::min(count, first + kTokensPerTask);
    BERTOPS_DISPATCH(dtype, plain_differences, p, tokens.data(), first, last, scratch)
  });
}

// The rows of the loss; `p` holds what becomes of gradients.
Tensor run(ProjectedMSE& p, const Tensor& hidden_s, const std::optional<Tensor>& weight,
           const std::optional<Tensor>& bias, const Tensor& hidden_t, const std::optional<Tensor>& mask) {
  if (weight) {
    p.student = Linear(hidden_s, *weight, bias);
  } else {
    p.student.hidden = Matrix(hidden_s);
    p.student.width = p.student.outputs = hidden_s.size(1);
  }
  p.hidden_t = Matrix(hidden_t);
  STD_TORCH_CHECK(hidden_t.size(0) == hidden_s.size(0) && hidden_t.size(1) == p.student.outputs,
                  "bertops: the teacher's hidden states must have the shape of the student's projection");
  Tensor rows = new_loss_rows(hidden_s);
  p.rows = rows.data_ptr();
  const std::vector<int64_t> tokens = real_tokens(hidden_s.size(0), mask);
  clear_rest(p.student, tokens, rows, p.grads);
  if (tokens.empty()) return rows;
  if (weight) {
    run_projected(p, tokens);
  } else {
    run_plain(p, tokens);
  }
  return rows;
}

Tensor projected_mse_fwd(const Tensor& hidden_s, std::optional<Tensor> weight, std::optional<Tensor> bias,
                         const Tensor& hidden_t, std::optional<Tensor> mask) {
  ProjectedMSE p{};
  return run(p, hidden_s, weight, bias, hidden_t, mask);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> projected_mse_with_grads(
    const Tensor& grad_rows, const Tensor& hidden_s, std::optional<Tensor> weight, std::optional<Tensor> bias,
    const Tensor& hidden_t, std::optional<Tensor> mask, bool want_hidden, bool want_weight, bool want_bias) {
  ProjectedMSE p{};
  GradTensors grads(hidden_s, weight, bias, want_hidden, want_weight, want_bias);
  p.grad_rows = Matrix(grad_rows);
  p.grads = grads.grads;
  const Tensor rows = run(p, hidden_s, weight, bias, hidden_t, mask);
  return {rows, grads.hidden, grads.weight, grads.bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bertops, CPU, m) {
  m.impl("projected_mse_fwd", TORCH_BOX(&projected_mse_fwd));
  m.impl("projected_mse_with_grads", TORCH_BOX(&projected_mse_with_grads));
}

}  // namespace bertops
