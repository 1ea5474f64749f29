// What the tensor side of an op over heads (<op>.cpp, tasks.h) hands to its loops, once per instruction set.
#pragma once

#include <cstdint>

#include "cpu/dtypes.h"

namespace bertops {

// A (B, H, N, D) tensor, the (B, H, N, N) map or (B, H, N) rows; strides in elements.
struct Heads {
  void* data = nullptr;
  DType dtype = DType::kFloat;
  int64_t batch_stride = 0, head_stride = 0, row_stride = 0, dim_stride = 0;
};

// The real rows of one sequence: row `begin + position[i]` of batch `batch`, i < count, positions ascending.
struct Sequence {
  const int32_t* position;
  int64_t count;
  int64_t batch;
  int64_t begin;
  int64_t length;    // rows that the sequence spans, real or not
  int64_t identity;  // which sequence it is, in the batch or among the packed ones
  bool dense;        // every row is real
};

// One unit of work: queries [first, last) of the real rows of a sequence, in one head.
struct HeadTask {
  const Sequence* sequence;
  int64_t head;
  int64_t first, last;
  void* sums;  // where this task adds up what all queries give to a key; null: in its own scratch
};

constexpr int64_t kQueryBlock = 64;
constexpr int64_t kKeyBlock = 64;
constexpr int64_t kPadding = 16;  // rows and columns of scratch, a multiple of every vector length

inline int64_t padded(int64_t x) { return (x + kPadding - 1) / kPadding * kPadding; }

}  // namespace bertops
