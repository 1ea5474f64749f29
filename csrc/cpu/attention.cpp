// CPU kernels of attention and attention_with_scores: tensors in, tasks out. The loops are in
// attention_forward.h and attention_backward.h.
#include "cpu/attention.h"

#include <cmath>
#include <cstring>
#include <numeric>
#include <vector>

#include "common/philox.h"
#include "common/tensors.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"

#define BERTOPS_PER_ISA "cpu/attention_isa.h"
#include "cpu/foreach_isa.h"

namespace bertops {
namespace {

constexpr int64_t kTasksPerThread = 4;
constexpr int64_t kQueriesPerForwardTask = 64;
constexpr int64_t kQueriesPerBackwardTask = 256;

DType dtype_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return DType::kFloat;
    case ScalarType::Double: return DType::kDouble;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kFloat16;
    default: break;
  }
  STD_TORCH_CHECK(false, "bertops: attention takes float32, float64, bfloat16 or float16");
  return DType::kFloat;
}

Heads heads_of(const Tensor& x) {
  return {x.data_ptr(), dtype_of(x.scalar_type()), x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
}

// The sequences of a batch and the positions of their real rows.
struct Rows {
  std::vector<int32_t> positions;
  std::vector<Sequence> sequences;
  int64_t longest = 0;

  Rows(const Tensor& q, const std::optional<Tensor>& mask, const std::optional<Tensor>& cu_seqlens) {
    const int64_t batch = q.size(0), length = q.size(2);
    if (mask) {
      from_mask(*mask, batch, length);
    } else {
      positions.resize(length);
      std::iota(positions.begin(), positions.end(), 0);
      if (cu_seqlens) {
        from_offsets(*cu_seqlens, length);
      } else {
        for (int64_t b = 0; b < batch; ++b) add(positions.data(), length, b, 0, length, b);
      }
    }
  }

 private:
  void add(const int32_t* position, int64_t count, int64_t batch, int64_t begin, int64_t length,
           int64_t identity) {
    sequences.push_back({position, count, batch, begin, length, identity, count == length});
    longest = std::max(longest, count);
  }

  void from_mask(const Tensor& mask, int64_t batch, int64_t length) {
    STD_TORCH_CHECK(mask.scalar_type() == ScalarType::Bool && mask.dim() == 2 && mask.size(0) == batch &&
                        mask.size(1) == length,
                    "bertops: mask must be bool of shape (B, N)");
    const bool* real = static_cast<const bool*>(mask.data_ptr());
    const int64_t batch_stride = mask.stride(0), row_stride = mask.stride(1);
    positions.resize(batch * length);
    int32_t* next = positions.data();
    for (int64_t b = 0; b < batch; ++b) {
      const int32_t* first = next;
      for (int64_t i = 0; i < length; ++i) {
        if (real[b * batch_stride + i * row_stride]) *next++ = static_cast<int32_t>(i);
      }
      add(first, next - first, b, 0, length, b);
    }
  }

  void from_offsets(const Tensor& cu_seqlens, int64_t length) {
    STD_TORCH_CHECK(
        cu_seqlens.scalar_type() == ScalarType::Int && cu_seqlens.dim() == 1 && cu_seqlens.size(0) > 0,
        "bertops: cu_seqlens must be int32 of shape (number of sequences + 1,)");
    const int32_t* offset = static_cast<const int32_t*>(cu_seqlens.data_ptr());
    const int64_t stride = cu_seqlens.stride(0), sequences_count = cu_seqlens.size(0) - 1;
    STD_TORCH_CHECK(offset[0] == 0 && offset[sequences_count * stride] == length,
                    "bertops: cu_seqlens must run from 0 to the token count");
    for (int64_t s = 0; s < sequences_count; ++s) {
      const int64_t begin = offset[s * stride], end = offset[(s + 1) * stride];
      STD_TORCH_CHECK(begin <= end && end <= length, "bertops: cu_seqlens must not decrease");
      add(positions.data(), end - begin, 0, begin, end - begin, s);
    }
  }
};

// The real queries of every sequence and head, in parts of at least `queries_per_task` where that feeds more threads.
std::vector<AttentionTask> tasks_of(const Rows& rows, int64_t heads, int64_t queries_per_task) {
  const int64_t sequences_heads = std::max<int64_t>(1, heads * static_cast<int64_t>(rows.sequences.size()));
  const int64_t wanted =
      (kTasksPerThread * torch::stable::get_num_threads() + sequences_heads - 1) / sequences_heads;
  std::vector<AttentionTask> tasks;
  for (const Sequence& sequence : rows.sequences) {
    const int64_t most = std::max<int64_t>(1, (sequence.count + queries_per_task - 1) / queries_per_task);
    const int64_t parts = torch::stable::get_num_threads() == 1 ? 1 : std::min(wanted, most);
    const int64_t blocks = (sequence.count + kQueryBlock - 1) / kQueryBlock;
    for (int64_t head = 0; head < heads; ++head) {
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t first = std::min(sequence.count, blocks * part / parts * kQueryBlock);
        const int64_t last = std::min(sequence.count, blocks * (part + 1) / parts * kQueryBlock);
        tasks.push_back({&sequence, head, first, last, nullptr, nullptr});
      }
    }
  }
  return tasks;
}

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

// Runs FUNCTION of this processor's instruction set, in the type that a dtype is computed in.
#define BERTOPS_DISPATCH(DTYPE, FUNCTION, ...)      \
  if (DTYPE == DType::kDouble) {                    \
    BERTOPS_CALL_ISA(FUNCTION<double>, __VA_ARGS__) \
  } else {                                          \
    BERTOPS_CALL_ISA(FUNCTION<float>, __VA_ARGS__)  \
  }

int64_t accumulator_bytes(DType dtype) { return dtype == DType::kDouble ? sizeof(double) : sizeof(float); }

void forward(const Attention& p, const Rows& rows) {
  const std::vector<AttentionTask> tasks = tasks_of(rows, p.heads, kQueriesPerForwardTask);
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

  std::vector<AttentionTask> tasks = tasks_of(rows, p.heads, kQueriesPerBackwardTask);
  // tasks of one sequence and head follow each other; where they are several, each sums dK and dV for itself
  std::vector<std::pair<int64_t, int64_t>> shared;
  int64_t sums = 0;
  for (size_t t = 0; t < tasks.size(); ++t) {
    const bool same = !shared.empty() && tasks[shared.back().first].sequence == tasks[t].sequence &&
                      tasks[shared.back().first].head == tasks[t].head;
    if (same) {
      ++shared.back().second;
    } else {
      shared.emplace_back(t, 1);
    }
  }
  const int64_t width = padded(p.head_dim);
  for (const auto& [first, parts] : shared) {
    if (parts > 1) sums += 2 * parts * padded(tasks[first].sequence->count) * width;
  }
  std::vector<char> memory(sums * accumulator_bytes(dtype));
  char* next = memory.data();
  for (const auto& [first, parts] : shared) {
    for (int64_t t = first; parts > 1 && t < first + parts; ++t) {
      const int64_t bytes = padded(tasks[t].sequence->count) * width * accumulator_bytes(dtype);
      tasks[t].dk = next;
      tasks[t].dv = next + bytes;
      next += 2 * bytes;
    }
  }
  const int64_t bytes = attention_backward_scratch(rows.longest, p.head_dim) * accumulator_bytes(dtype);
  run_tasks(tasks.size(), bytes, [&](int64_t task, void* scratch) {
    BERTOPS_DISPATCH(dtype, attention_backward, p, tasks[task], scratch)
  });
  if (sums > 0) {
    run_tasks(shared.size(), 0, [&](int64_t i, void*) {
      const auto& [first, parts] = shared[i];
      if (parts == 1) return;
      BERTOPS_DISPATCH(dtype, attention_reduce, p, &tasks[first], parts)
    });
  }
  return {dq, dk, dv};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bertops, CPU, m) {
  m.impl("attention_fwd", TORCH_BOX(&attention_fwd));
  m.impl("attention_with_scores_fwd", TORCH_BOX(&attention_with_scores_fwd));
  m.impl("attention_bwd", TORCH_BOX(&attention_bwd));
}

}  // namespace bertops
