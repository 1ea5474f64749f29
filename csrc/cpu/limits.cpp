// Loops that measure what the processor can do at most; the bench prints every kernel's share of it.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <cstdint>
#include <tuple>

#include "cpu/isa.h"

#define BERTOPS_PER_ISA "cpu/limits_loops.h"
#include "cpu/foreach_isa.h"

namespace {

using torch::stable::Tensor;

// Runs `loop` on every thread: a sum a thread, so that nothing is optimised away, and the number of operations.
template <class Loop>
std::tuple<Tensor, int64_t> on_every_thread(const Tensor& like, const Loop& loop) {
  const int64_t threads = torch::stable::get_num_threads();
  Tensor sums = torch::stable::new_empty(like, {threads}, torch::headeronly::ScalarType::Float);
  float* sum = static_cast<float*>(sums.data_ptr());
  std::atomic<int64_t> operations = 0;
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      int64_t count = 0;
      loop(sum + thread, &count);
      operations += count;
    }
  });
  return {sums, operations.load()};
}

std::tuple<Tensor, int64_t> limits_fma(const Tensor& like, int64_t steps) {
  return on_every_thread(like,
                         [=](float* sum, int64_t* flops) { BERTOPS_CALL_ISA(fma_loop, steps, sum, flops) });
}

std::tuple<Tensor, int64_t> limits_exp(const Tensor& like, int64_t steps) {
  return on_every_thread(like,
                         [=](float* sum, int64_t* exps) { BERTOPS_CALL_ISA(exp_loop, steps, sum, exps) });
}

// Nothing: what is left is the cost of going through the dispatcher.
void limits_launch(const Tensor& like) {}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bertops, CPU, m) {
  m.impl("_limits_fma", TORCH_BOX(&limits_fma));
  m.impl("_limits_exp", TORCH_BOX(&limits_exp));
  m.impl("_limits_launch", TORCH_BOX(&limits_launch));
}
