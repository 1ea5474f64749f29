// CPU kernels of linear_kl_div. The loops are in linear_kl_div_loops.h.
#include "cpu/linear_kl_div.h"

#define BERTOPS_PER_ISA "cpu/linear_kl_div_isa.h"
#include "cpu/foreach_isa.h"

namespace bertops {
namespace {

constexpr int64_t kLogitBytes = int64_t{96} << 20;  // of both models' logits of a chunk

// Memory for chunks of `tokens`, in elements of `size` bytes.
Workspace take_memory(LinearKL& p, int64_t tokens, int64_t size) {
  const int64_t words = padded(p.student.outputs), tasks = (words + kOutputBlock - 1) / kOutputBlock;
  const bool with_grads = p.grad_rows.data != nullptr;
  const int64_t width_s = rounded(p.student.width, kPanelPadding);
  const int64_t width_t = rounded(p.teacher.width, kPanelPadding);
  const int64_t of_token = width_s * (with_grads ? 3 : 1) + width_t + 2 * words + 2 * tasks + 3;
  Workspace memory(tokens * of_token * size + 8 * 64);
  p.columns_s = memory.take(tokens * width_s, size);
  p.columns_t = memory.take(tokens * width_t, size);
  p.logits_s = memory.take(tokens * words, size);
  p.logits_t = memory.take(tokens * words, size);
  p.tops = memory.take(tokens * 2 * tasks, size);
  p.factors = memory.take(tokens * 3, size);
  if (with_grads) {
    p.rows_s = memory.take(tokens * width_s, size);
    p.sums = memory.take(tokens * width_s, size);
  }
  return memory;
}

// The rows of the loss; `p` holds what becomes of gradients.
Tensor run(LinearKL& p, const Tensor& hidden_s, const std::optional<Tensor>& mask) {
  const DType dtype = p.student.hidden.dtype;
  const int64_t size = accumulator_bytes(dtype), threads = torch::stable::get_num_threads();
  Tensor rows = new_loss_rows(hidden_s);
  p.rows = rows.data_ptr();
  const std::vector<int64_t> tokens = real_tokens(hidden_s.size(0), mask);
  clear_rest(p.student, tokens, rows, p.grads);
  if (tokens.empty()) return rows;
  const int64_t count = static_cast<int64_t>(tokens.size()), words = p.student.outputs;
  const int64_t widest = std::max(p.student.width, p.teacher.width);
  const int64_t step = chunk_tokens(count, 2 * padded(words) * size, kLogitBytes);
  const Workspace memory = take_memory(p, step, size);
  for (int64_t first = 0; first < count; first += step) {
    const int64_t some = std::min(step, count - first);
    const Chunk chunk{tokens.data() + first, some, (some + kQueryBlock - 1) / kQueryBlock, first == 0};
    run_tasks(chunk.blocks, pack_scratch(widest) * size, [&](int64_t block, void* scratch) {
      BERTOPS_DISPATCH(dtype, vocabulary_pack, p, chunk, block, scratch)
    });
    const OutputTasks outputs(words, chunk.blocks, threads);
    run_tasks(outputs.count(), output_scratch(widest) * size, [&](int64_t task, void* scratch) {
      BERTOPS_DISPATCH(dtype, vocabulary_logits, p, chunk, outputs.block(task), outputs.from(task),
                       outputs.to(task), scratch)
    });
    const int64_t columns = chunk.blocks >= threads ? kQueryBlock : kPadding, parts = kQueryBlock / columns;
    run_tasks(chunk.blocks * parts, 6 * kQueryBlock * size, [&](int64_t task, void* scratch) {
      BERTOPS_DISPATCH(dtype, vocabulary_softmax, p, chunk, task / parts, task % parts * columns, columns,
                       scratch)
    });
    if (p.grad_rows.data == nullptr) continue;
    const GradTasks grads(p.student, p.grads, chunk.blocks, threads);
    run_tasks(grads.count(), grad_scratch() * size, [&](int64_t task, void* scratch) {
      if (task < grads.hidden.count()) {
        BERTOPS_DISPATCH(dtype, vocabulary_hidden_grads, p, chunk, grads.hidden.from(task),
                         grads.hidden.to(task), grads.hidden.first(task), grads.hidden.last(task), scratch)
      } else {
        BERTOPS_DISPATCH(dtype, vocabulary_weight_grads, p, chunk, task - grads.hidden.count(), scratch)
      }
    });
  }
  return rows;
}

LinearKL problem(const Tensor& hidden_s, const Tensor& weight_s, const std::optional<Tensor>& bias_s,
                 const Tensor& hidden_t, const Tensor& weight_t, const std::optional<Tensor>& bias_t,
                 double temperature) {
  LinearKL p{};
  p.student = Linear(hidden_s, weight_s, bias_s);
  p.teacher = Linear(hidden_t, weight_t, bias_t);
  p.temperature = temperature;
  STD_TORCH_CHECK(hidden_t.size(0) == hidden_s.size(0) && p.teacher.outputs == p.student.outputs,
                  "bertops: student and teacher must have one M and one V");
  return p;
}

Tensor linear_kl_div_fwd(const Tensor& hidden_s, const Tensor& weight_s, std::optional<Tensor> bias_s,
                         const Tensor& hidden_t, const Tensor& weight_t, std::optional<Tensor> bias_t,
                         std::optional<Tensor> mask, double temperature) {
  LinearKL p = problem(hidden_s, weight_s, bias_s, hidden_t, weight_t, bias_t, temperature);
  return run(p, hidden_s, mask);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_kl_div_with_grads(
    const Tensor& grad_rows, const Tensor& hidden_s, const Tensor& weight_s, std::optional<Tensor> bias_s,
    const Tensor& hidden_t, const Tensor& weight_t, std::optional<Tensor> bias_t, std::optional<Tensor> mask,
    double temperature, bool want_hidden, bool want_weight, bool want_bias) {
  LinearKL p = problem(hidden_s, weight_s, bias_s, hidden_t, weight_t, bias_t, temperature);
  GradTensors grads(hidden_s, weight_s, bias_s, want_hidden, want_weight, want_bias);
  p.grad_rows = Matrix(grad_rows);
  p.grads = grads.grads;
  const Tensor rows = run(p, hidden_s, mask);
  return {rows, grads.hidden, grads.weight, grads.bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bertops, CPU, m) {
  m.impl("linear_kl_div_fwd", TORCH_BOX(&linear_kl_div_fwd));
  m.impl("linear_kl_div_with_grads", TORCH_BOX(&linear_kl_div_with_grads));
}

}  // namespace bertops
