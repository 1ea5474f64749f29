// CPU kernels of attention and attention_with_scores: tensors in, tasks out. The loops are in
// attention_forward.h and attention_backward.h.
#include "cpu/attention.h"

#include <cmath>
#include <cstring>

#include "common/philox.h"
#include "cpu/tasks.h"

#define BERTOPS_PER_ISA "cpu/attention_isa.h"
#include "cpu/foreach_isa.h"

namespace bertops {
namespace {

Attention common(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& seed,
                 int64_t window, double scale, double dropout_p) {
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4,
                  "bertops: q, k, v must have shape (B, H, N, D)");
  STD_TORCH_CHECK(q.scalar_type() == k.scalar_type() && q.scalar_type() == v.scalar_type(),
                  "bertops: q, k, v must have one dtype");
  for (int64_t d = 0; d < 4; ++d) {
    STD_TORCH_CHECK(q.size(d) == k.size(d) && q.size(d) == v.size(d), "bertops: q, k, v must have one shape");
  }
  Attention p{};
  p.q = heads_of(q);
  p.k = heads_of(k);
  p.v = heads_of(v);
  p.heads = q.size(1);
  p.length = q.size(2);
  p.head_dim = q.size(3);
  p.window = window;
  p.scale = scale;
  p.dropout_p = dropout_p;
  if (dropout_p > 0) {
    STD_TORCH_CHECK(seed && seed->numel() == 1 && seed->scalar_type() == ScalarType::Long,
                    "bertops: dropout needs an int64 seed of one element");
    std::memcpy(&p.seed, seed->data_ptr(), sizeof(p.seed));
    p.keep_from = std::min<uint64_t>(static_cast<uint64_t>(std::ldexp(dropout_p, 32)), 0xFFFFFFFFu);
  }
  return p;
}

void forward(const Attention& p, const Rows& rows) {
  const std::vector<HeadTask> tasks = tasks_of(rows, p.heads, kQueriesPerTask, kTasksPerThread);
  const int64_t bytes = attention_forward_scratch(rows.longest, p.head_dim) * accumulator_bytes(p.q.dtype);
  run_tasks(tasks.size(), bytes, [&](int64_t task, void* scratch) {
    BERTOPS_DISPATCH(p.q.dtype, attention_forward, p, tasks[task], scratch)
  });
}

std::tuple<Tensor, Tensor> attention_fwd(const Tensor& q, const Tensor& k, const Tensor& v,
                                         std::optional<Tensor> mask, std::optional<Tensor> cu_seqlens,
                                         int64_t window, double scale, double dropout_p,
                                         std::optional<Tensor> seed) {
  Attention p = common(q, k, v, seed, window, scale, dropout_p);
  const Rows rows(q, mask, cu_seqlens);
  Tensor out = rows_first(q);
  Tensor lse =
      torch::stable::new_empty(q, {q.size(0), p.heads, p.length}, accumulator_dtype(q.scalar_type()));
  p.out = heads_of(out);
  p.lse = lse.data_ptr();
  forward(p, rows);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> attention_with_scores_fwd(const Tensor& q, const Tensor& k,
                                                             const Tensor& v, std::optional<Tensor> mask,
                                                             std::optional<Tensor> cu_seqlens, int64_t window,
                                                             double scale, double dropout_p,
                                                             std::optional<Tensor> seed,
                                                             ScalarType scores_dtype) {
  Attention p = common(q, k, v, seed, window, scale, dropout_p);
  const Rows rows(q, mask, cu_seqlens);
  Tensor out = rows_first(q);
  Tensor lse =
      torch::stable::new_empty(q, {q.size(0), p.heads, p.length}, accumulator_dtype(q.scalar_type()));
  Tensor scores = torch::stable::new_empty(q, {q.size(0), p.heads, p.length, p.length}, scores_dtype);
  prefer_huge_pages(scores);
  p.out = heads_of(out);
  p.lse = lse.data_ptr();
  p.scores = heads_of(scores);
  forward(p, rows);
  return {out, lse, scores};
}

std::tuple<Tensor, Tensor, Tensor> attention_bwd(const Tensor& grad_out, std::optional<Tensor> grad_lse,
                                                 std::optional<Tensor> grad_scores, const Tensor& q,
                                                 const Tensor& k, const Tensor& v, const Tensor& out,
                                                 const Tensor& lse, std::optional<Tensor> mask,
                                                 std::optional<Tensor> cu_seqlens, int64_t window,
                                                 double scale, double dropout_p, std::optional<Tensor> seed) {
  Attention p = common(q, k, v, seed, window, scale, dropout_p);
  const Rows rows(q, mask, cu_seqlens);
  const DType dtype = p.q.dtype;
  STD_TORCH_CHECK(grad_out.scalar_type() == q.scalar_type(), "bertops: grad_out must have the dtype of q");
  Tensor dq = rows_first(q), dk = rows_first(q), dv = rows_first(q);
  const Tensor dense_lse = torch::stable::contiguous(lse);
  std::optional<Tensor> dense_grad_lse;
  if (grad_lse) dense_grad_lse = torch::stable::contiguous(*grad_lse);
  p.out = heads_of(out);
  p.grad_out = heads_of(grad_out);
  p.lse = dense_lse.data_ptr();
  p.grad_lse = dense_grad_lse ? dense_grad_lse->data_ptr() : nullptr;
  if (grad_scores) p.grad_scores = heads_of(*grad_scores);
  p.dq = heads_of(dq);
  p.dk = heads_of(dk);
  p.dv = heads_of(dv);

  std::vector<HeadTask> tasks = tasks_of(rows, p.heads, kQueriesPerSummingTask, kSummingTasksPerThread);
  const int64_t row_bytes = 2 * padded(p.head_dim) * accumulator_bytes(dtype);
  const PartialSums sums(tasks, [&](int64_t count) { return padded(count) * row_bytes; });
  const int64_t bytes = attention_backward_scratch(rows.longest, p.head_dim) * accumulator_bytes(dtype);
  run_tasks(tasks.size(), bytes, [&](int64_t task, void* scratch) {
    BERTOPS_DISPATCH(dtype, attention_backward, p, tasks[task], scratch)
  });
  sums.reduce([&](const HeadTask* parts, int64_t count) {
    BERTOPS_DISPATCH(dtype, attention_reduce, p, parts, count)
  });
  return {dq, dk, dv};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bertops, CPU, m) {
  m.impl("attention_fwd", TORCH_BOX(&attention_fwd));
  m.impl("attention_with_scores_fwd", TORCH_BOX(&attention_with_scores_fwd));
  m.impl("attention_bwd", TORCH_BOX(&attention_bwd));
}

}  // namespace bertops
