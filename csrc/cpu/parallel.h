// Runs tasks of unequal cost on PyTorch's threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <new>

#include "common/tensors.h"

namespace bertops {

// run(task, scratch) for every task < count, each thread with `scratch_bytes` of its own, taken as they come free.
template <class Run>
void run_tasks(int64_t count, int64_t scratch_bytes, const Run& run) {
  constexpr int64_t kAlignment = 64;
  const int64_t bytes = (scratch_bytes + kAlignment - 1) / kAlignment * kAlignment;
  const int64_t workers = std::min<int64_t>(count, torch::stable::get_num_threads());
  std::atomic<int64_t> next{0};
  std::atomic<bool> out_of_memory{false};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    void* scratch = bytes == 0 ? nullptr : std::aligned_alloc(kAlignment, bytes);
    if (scratch == nullptr && bytes != 0) {
      out_of_memory = true;
      return;
    }
    for (int64_t task = next++; task < count; task = next++) run(task, scratch);
    std::free(scratch);
  });
  if (out_of_memory) throw std::bad_alloc();
}

}  // namespace bertops
