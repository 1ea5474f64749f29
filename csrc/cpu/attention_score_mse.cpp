// CPU kernels of attention_score_mse: tensors in, tasks out. The loops are in attention_score_mse_loops.h.
#include "cpu/attention_score_mse.h"

#include "cpu/pair_tensors.h"
#include "cpu/tasks.h"

#define BERTOPS_PER_ISA "cpu/attention_score_mse_isa.h"
#include "cpu/foreach_isa.h"

namespace bertops {
namespace {

void run_direct(const ScoreMSE& p, const Rows& rows) {
  const bool with_grads = p.dq.data != nullptr;
  const DType dtype = p.q_s.dtype;
  std::vector<HeadTask> tasks = loss_tasks_of(rows, p.heads, with_grads);
  const int64_t row_bytes = with_grads ? padded(p.head_dim_s) * accumulator_bytes(dtype) : 0;
  const PartialSums sums(tasks, [&](int64_t count) { return padded(count) * row_bytes; });
  const int64_t bytes = direct_scratch(p, rows.longest) * accumulator_bytes(dtype);
  run_tasks(tasks.size(), bytes, [&](int64_t task, void* scratch) {
    BERTOPS_DISPATCH(dtype, direct_task, p, tasks[task], scratch)
  });
  sums.reduce(
      [&](const HeadTask* parts, int64_t count) { BERTOPS_DISPATCH(dtype, direct_reduce, p, parts, count) });
}

Tensor attention_score_mse_fwd(const Tensor& q_s, const Tensor& k_s, const Tensor& q_t, const Tensor& k_t,
                               std::optional<Tensor> mask, std::optional<Tensor> cu_seqlens, double scale_s,
                               double scale_t) {
  ScoreMSE p = pair_of<ScoreMSE>(q_s, k_s, q_t, k_t, scale_s, scale_t);
  Tensor squares = new_rows(q_s);
  p.rows = squares.data_ptr();
  run_direct(p, Rows(q_s, mask, cu_seqlens));
  return squares;
}

std::tuple<Tensor, Tensor> attention_score_mse_bwd(const Tensor& grad_rows, const Tensor& q_s,
                                                   const Tensor& k_s, const Tensor& q_t, const Tensor& k_t,
                                                   std::optional<Tensor> mask,
                                                   std::optional<Tensor> cu_seqlens, double scale_s,
                                                   double scale_t) {
  ScoreMSE p = pair_of<ScoreMSE>(q_s, k_s, q_t, k_t, scale_s, scale_t);
  Tensor dq_s = rows_first(q_s), dk_s = rows_first(k_s);
  p.grad_rows = heads_of_rows(grad_rows);
  p.dq = heads_of(dq_s);
  p.dk = heads_of(dk_s);
  run_direct(p, Rows(q_s, mask, cu_seqlens));
  return {dq_s, dk_s};
}

std::tuple<Tensor, Tensor, Tensor> attention_score_mse_with_grads(const Tensor& q_s, const Tensor& k_s,
                                                                  const Tensor& q_t, const Tensor& k_t,
                                                                  std::optional<Tensor> mask,
                                                                  std::optional<Tensor> cu_seqlens,
                                                                  double scale_s, double scale_t) {
  ScoreMSE p = pair_of<ScoreMSE>(q_s, k_s, q_t, k_t, scale_s, scale_t);
  const ScalarType dtype = accumulator_dtype(q_s.scalar_type());
  Tensor squares = new_rows(q_s), dq_s = rows_first(q_s, dtype), dk_s = rows_first(k_s, dtype);
  p.rows = squares.data_ptr();
  p.dq = heads_of(dq_s);
  p.dk = heads_of(dk_s);
  run_direct(p, Rows(q_s, mask, cu_seqlens));
  return {squares, dq_s, dk_s};
}

std::tuple<Tensor, Tensor> attention_score_mse_gram_fwd(const Tensor& q_s, const Tensor& k_s,
                                                        const Tensor& q_t, const Tensor& k_t,
                                                        std::optional<Tensor> mask,
                                                        std::optional<Tensor> cu_seqlens, double scale_s,
                                                        double scale_t) {
  ScoreMSE p = pair_of<ScoreMSE>(q_s, k_s, q_t, k_t, scale_s, scale_t);
  const Rows rows(q_s, mask, cu_seqlens);
  const DType dtype = p.q_s.dtype;
  const ScalarType accumulator = accumulator_dtype(q_s.scalar_type());
  const int64_t sequences = rows.sequences.size(), dim = pair_dim(p), width = padded(dim);
  Tensor totals = torch::stable::new_empty(q_s, {sequences, p.heads}, accumulator);
  Tensor grams = torch::stable::new_empty(q_s, {sequences, p.heads, 2, dim, dim}, accumulator);
  prefer_huge_pages(grams);
  p.sums = totals.data_ptr();
  p.grams = grams.data_ptr();
  std::vector<HeadTask> tasks = equal_tasks_of(rows, p.heads, kRowsPerGramTask);
  const PartialSums sums(tasks, [&](int64_t) { return 2 * width * width * accumulator_bytes(dtype); });
  run_tasks(tasks.size(), gram_scratch(p) * accumulator_bytes(dtype),
            [&](int64_t task, void* scratch) { BERTOPS_DISPATCH(dtype, gram_task, p, tasks[task], scratch) });
  sums.reduce(
      [&](const HeadTask* parts, int64_t count) { BERTOPS_DISPATCH(dtype, gram_reduce, p, parts, count) });
  return {totals, grams};
}

std::tuple<Tensor, Tensor> attention_score_mse_gram_bwd(const Tensor& grad, const Tensor& q_s,
                                                        const Tensor& k_s, const Tensor& q_t,
                                                        const Tensor& k_t, std::optional<Tensor> mask,
                                                        std::optional<Tensor> cu_seqlens, double scale_s,
                                                        double scale_t, const Tensor& grams) {
  ScoreMSE p = pair_of<ScoreMSE>(q_s, k_s, q_t, k_t, scale_s, scale_t);
  const Rows rows(q_s, mask, cu_seqlens);
  const ScalarType accumulator = accumulator_dtype(q_s.scalar_type());
  const int64_t sequences = rows.sequences.size(), dim = pair_dim(p);
  STD_TORCH_CHECK(grad.numel() == 1 && grad.scalar_type() == accumulator,
                  "bertops: grad must be one number in the dtype of losses");
  STD_TORCH_CHECK(grams.scalar_type() == accumulator && grams.numel() == sequences * p.heads * 2 * dim * dim,
                  "bertops: grams must be those of the forward");
  const Tensor dense_grams = torch::stable::contiguous(grams);
  Tensor dq_s = rows_first(q_s), dk_s = rows_first(k_s);
  p.grad = grad.data_ptr();
  p.grams = dense_grams.data_ptr();
  p.dq = heads_of(dq_s);
  p.dk = heads_of(dk_s);
  const std::vector<HeadTask> tasks = equal_tasks_of(rows, p.heads, kRowsPerGramTask);
  const DType dtype = p.q_s.dtype;
  run_tasks(tasks.size(), gram_grad_scratch(p) * accumulator_bytes(dtype), [&](int64_t task, void* scratch) {
    BERTOPS_DISPATCH(dtype, gram_grad_task, p, tasks[task], scratch)
  });
  return {dq_s, dk_s};
}

std::tuple<Tensor, Tensor, Tensor> attention_score_mse_gram_with_grads(const Tensor& q_s, const Tensor& k_s,
                                                                       const Tensor& q_t, const Tensor& k_t,
                                                                       std::optional<Tensor> mask,
                                                                       std::optional<Tensor> cu_seqlens,
                                                                       double scale_s, double scale_t) {
  ScoreMSE p = pair_of<ScoreMSE>(q_s, k_s, q_t, k_t, scale_s, scale_t);
  const Rows rows(q_s, mask, cu_seqlens);
  const DType dtype = p.q_s.dtype;
  const ScalarType accumulator = accumulator_dtype(q_s.scalar_type());
  const int64_t sequences = rows.sequences.size();
  Tensor totals = torch::stable::new_empty(q_s, {sequences, p.heads}, accumulator);
  Tensor dq_s = rows_first(q_s, accumulator), dk_s = rows_first(k_s, accumulator);
  p.sums = totals.data_ptr();
  p.dq = heads_of(dq_s);
  p.dk = heads_of(dk_s);
  const std::vector<HeadTask> tasks = equal_tasks_of(rows, p.heads, std::max<int64_t>(1, rows.longest));
  run_tasks(tasks.size(), gram_with_grads_scratch(p) * accumulator_bytes(dtype),
            [&](int64_t task, void* scratch) {
              BERTOPS_DISPATCH(dtype, gram_with_grads_task, p, tasks[task], scratch)
            });
  return {totals, dq_s, dk_s};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bertops, CPU, m) {
  m.impl("attention_score_mse_fwd", TORCH_BOX(&attention_score_mse_fwd));
  m.impl("attention_score_mse_bwd", TORCH_BOX(&attention_score_mse_bwd));
  m.impl("attention_score_mse_with_grads", TORCH_BOX(&attention_score_mse_with_grads));
  m.impl("attention_score_mse_gram_fwd", TORCH_BOX(&attention_score_mse_gram_fwd));
  m.impl("attention_score_mse_gram_bwd", TORCH_BOX(&attention_score_mse_gram_bwd));
  m.impl("attention_score_mse_gram_with_grads", TORCH_BOX(&attention_score_mse_gram_with_grads));
}

}  // namespace bertops
