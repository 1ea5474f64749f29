// From tensors to tasks: the sequences of a batch with their real rows, cut into units of work for the threads.
#pragma once

#include <algorithm>
#include <numeric>
#include <optional>
#include <utility>
#include <vector>

#include "common/tensors.h"
#include "cpu/heads.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"

// Runs FUNCTION of this processor's instruction set, in the type that a dtype is computed in.
#define BERTOPS_DISPATCH(DTYPE, FUNCTION, ...)      \
  if (DTYPE == ::bertops::DType::kDouble) {         \
    BERTOPS_CALL_ISA(FUNCTION<double>, __VA_ARGS__) \
  } else {                                          \
    BERTOPS_CALL_ISA(FUNCTION<float>, __VA_ARGS__)  \
  }

namespace bertops {

// A part that only writes rows of its own may be short; one with sums over its queries costs memory.
constexpr int64_t kQueriesPerTask = 64, kTasksPerThread = 4;
constexpr int64_t kQueriesPerSummingTask = 256, kSummingTasksPerThread = 2;

inline DType dtype_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return DType::kFloat;
    case ScalarType::Double: return DType::kDouble;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kFloat16;
    default: break;
  }
  STD_TORCH_CHECK(false, "bertops: the CPU kernels take float32, float64, bfloat16 or float16");
  return DType::kFloat;
}

inline int64_t accumulator_bytes(DType dtype) {
  return dtype == DType::kDouble ? sizeof(double) : sizeof(float);
}

inline Heads heads_of(const Tensor& x) {
  return {x.data_ptr(), dtype_of(x.scalar_type()), x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
}

// The sequences of a batch and the positions of their real rows.
struct Rows {
  std::vector<int32_t> positions;
  std::vector<Sequence> sequences;
  int64_t longest = 0;

  // `x` is (B, H, N, D).
  Rows(const Tensor& x, const std::optional<Tensor>& mask, const std::optional<Tensor>& cu_seqlens)
      : Rows(x.size(0), x.size(2), mask, cu_seqlens) {}

  Rows(int64_t batch, int64_t length, const std::optional<Tensor>& mask,
       const std::optional<Tensor>& cu_seqlens) {
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

// The real queries of every sequence and head, in parts of at least `queries_per_task` where that makes up to
// `tasks_per_thread`. Parts of one sequence and head follow each other.
inline std::vector<HeadTask> tasks_of(const Rows& rows, int64_t heads, int64_t queries_per_task,
                                      int64_t tasks_per_thread) {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t sequences_heads = std::max<int64_t>(1, heads * static_cast<int64_t>(rows.sequences.size()));
  const int64_t wanted = (tasks_per_thread * threads + sequences_heads - 1) / sequences_heads;
  std::vector<HeadTask> tasks;
  for (const Sequence& sequence : rows.sequences) {
    const int64_t most = std::max<int64_t>(1, (sequence.count + queries_per_task - 1) / queries_per_task);
    const int64_t parts = threads == 1 ? 1 : std::min(wanted, most);
    const int64_t blocks = (sequence.count + kQueryBlock - 1) / kQueryBlock;
    for (int64_t head = 0; head < heads; ++head) {
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t first = std::min(sequence.count, blocks * part / parts * kQueryBlock);
        const int64_t last = std::min(sequence.count, blocks * (part + 1) / parts * kQueryBlock);
        tasks.push_back({&sequence, head, first, last, nullptr});
      }
    }
  }
  return tasks;
}

// The same for a loss, whose gradient sums over queries.
inline std::vector<HeadTask> loss_tasks_of(const Rows& rows, int64_t heads, bool with_grads) {
  return with_grads ? tasks_of(rows, heads, kQueriesPerSummingTask, kSummingTasksPerThread)
                    : tasks_of(rows, heads, kQueriesPerTask, kTasksPerThread);
}

// The real rows of every sequence and head in tasks of `rows_per_task`, at least one: whatever the threads, the same.
inline std::vector<HeadTask> equal_tasks_of(const Rows& rows, int64_t heads, int64_t rows_per_task) {
  std::vector<HeadTask> tasks;
  for (const Sequence& sequence : rows.sequences) {
    for (int64_t head = 0; head < heads; ++head) {
      int64_t first = 0;
      do {
        const int64_t last = std::min(sequence.count, first + rows_per_task);
        tasks.push_back({&sequence, head, first, last, nullptr});
        first = last;
      } while (first < sequence.count);
    }
  }
  return tasks;
}

// Memory for sums wherever several tasks share a sequence and head: each sums for itself, and `reduce` adds the
// parts up in their order.
class PartialSums {
 public:
  // A task over a sequence of `count` real rows takes bytes_of(count).
  template <class BytesOf>
  PartialSums(std::vector<HeadTask>& tasks, const BytesOf& bytes_of) : tasks_(tasks) {
    int64_t bytes = 0;
    for (size_t t = 0; t < tasks.size(); ++t) {
      const bool same = !groups_.empty() && tasks[groups_.back().first].sequence == tasks[t].sequence &&
                        tasks[groups_.back().first].head == tasks[t].head;
      if (same) {
        ++groups_.back().second;
      } else {
        groups_.emplace_back(t, 1);
      }
    }
    for (const auto& [first, parts] : groups_) {
      if (parts > 1) bytes += parts * bytes_of(tasks[first].sequence->count);
    }
    memory_.resize(bytes);
    char* next = memory_.data();
    for (const auto& [first, parts] : groups_) {
      for (int64_t t = first; parts > 1 && t < first + parts; ++t) {
        tasks[t].sums = next;
        next += bytes_of(tasks[t].sequence->count);
      }
    }
  }

  // add(first task, number of tasks) for every group of several.
  template <class Add>
  void reduce(const Add& add) const {
    if (memory_.empty()) return;
    run_tasks(groups_.size(), 0, [&](int64_t i, void*) {
      const auto& [first, parts] = groups_[i];
      if (parts > 1) add(&tasks_[first], parts);
    });
  }

 private:
  std::vector<HeadTask>& tasks_;
  std::vector<std::pair<int64_t, int64_t>> groups_;  // first task, number of tasks
  std::vector<char> memory_;
};

}  // namespace bertops
