// Sums of rows that share a key, as the gradient of a table is: deterministic, whatever the threads, and balanced
// however often one key occurs.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/dtypes.h"

namespace bertops {

constexpr int64_t kRowsPerChunk = 256;

// Rows [0, count) sorted by key, those of one key in their order; `skipped` is a key that takes no part.
struct SortedRows {
  std::vector<int64_t> order;  // rows
  std::vector<int64_t> begin;  // (keys + 1,): those of key k are order[begin[k]] to order[begin[k + 1]]

  SortedRows(const int64_t* key, int64_t count, int64_t keys, int64_t skipped) : begin(keys + 1) {
    for (int64_t row = 0; row < count; ++row) {
      if (key[row] != skipped) ++begin[key[row] + 1];
    }
    for (int64_t k = 0; k < keys; ++k) begin[k + 1] += begin[k];
    order.resize(begin[keys]);
    std::vector<int64_t> next(begin.begin(), begin.end() - 1);
    for (int64_t row = 0; row < count; ++row) {
      if (key[row] != skipped) order[next[key[row]]++] = row;
    }
  }
};

// sums[key] = the sum of all rows of that key. Sorted rows are cut into chunks; where the rows of a key reach over
// several, every chunk leaves a partial sum.
struct SegmentSums {
  const void* rows;  // (count, width) in the type of the computation
  int64_t width;
  const int64_t *key, *order, *begin;
  int64_t keys, count;  // `count` sorted rows
  void* sums;           // (keys, width)
  DType dtype;
  void* partial;  // (chunks, 2, width): of a key that began before the chunk, of one that goes on after it

  int64_t chunks() const { return (count + kRowsPerChunk - 1) / kRowsPerChunk; }
};

}  // namespace bertops
