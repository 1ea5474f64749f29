// Runs tasks of unequal cost on PyTorch's threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <new>

#include "common/tensors.h"

namespace bertops {

// Aligned memory of one thread. Up to kKept bytes stay with the thread: taking them from the system and giving
// them back costs a page fault every 4 KiB, more than a short call computes.
class ThreadScratch {
 public:
  ~ThreadScratch() { std::free(kept_); }

  // Null where there is no memory. Give it back with release().
  void* take(int64_t bytes) {
    const int64_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    if (rounded > kKept) return std::aligned_alloc(kAlignment, rounded);
    if (kept_ == nullptr || rounded > kept_bytes_) {
      std::free(kept_);
      kept_ = std::aligned_alloc(kAlignment, rounded);
      kept_bytes_ = kept_ == nullptr ? 0 : rounded;
    }
    return kept_;
  }
  void release(void* memory) {
    if (memory != kept_) std::free(memory);
  }

 private:
  static constexpr int64_t kAlignment = 64, kKept = int64_t{1} << 20;
  void* kept_ = nullptr;
  int64_t kept_bytes_ = 0;
};

// run(task, scratch) for every task < count, each thread with `scratch_bytes` of its own, taken as they come free.
template <class Run>
void run_tasks(int64_t count, int64_t scratch_bytes, const Run& run) {
  const int64_t workers = std::min<int64_t>(count, torch::stable::get_num_threads());
  std::atomic<int64_t> next{0};
  std::atomic<bool> out_of_memory{false};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    static thread_local ThreadScratch memory;
    void* scratch = memory.take(std::max<int64_t>(1, scratch_bytes));
    if (scratch == nullptr) {
      out_of_memory = true;
      return;
    }
    for (int64_t task = next++; task < count; task = next++) run(task, scratch);
    memory.release(scratch);
  });
  if (out_of_memory) throw std::bad_alloc();
}

}  // namespace bertops
