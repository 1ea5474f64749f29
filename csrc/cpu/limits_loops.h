// What this processor can do at most, a thread: included once per instruction set, see foreach_isa.h.
#include "cpu/vec.h"

namespace bertops::BERTOPS_ISA {

constexpr int kChains = 12;  // independent accumulators: more than two units times the latency of an FMA

// `steps` multiply-adds on each of kChains vectors; a sum that depends on all of them, and the FLOPs.
inline void fma_loop(int64_t steps, float* sum, int64_t* operations) {
  Vec<float> acc[kChains];
  for (int i = 0; i < kChains; ++i) acc[i] = broadcast(static_cast<float>(i + 2));
  const Vec<float> decay = broadcast(0.999f), growth = broadcast(0.001f);
  for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) acc[i] = acc[i] * decay + growth;
  }
  *sum = 0;
  for (int i = 0; i < kChains; ++i) *sum += acc[i][0];
  *operations = 2 * steps * kChains * kLanes<float>;
}

// `steps` exponentials on each of kChains vectors, of the kind that the attention kernels take.
inline void exp_loop(int64_t steps, float* sum, int64_t* operations) {
  Vec<float> x[kChains];
  for (int i = 0; i < kChains; ++i) x[i] = broadcast(static_cast<float>(-i));
  for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) x[i] = exp2(x[i]) - 2.f;
  }
  *sum = 0;
  for (int i = 0; i < kChains; ++i) *sum += x[i][0];
  *operations = steps * kChains * kLanes<float>;
}

}  // namespace bertops::BERTOPS_ISA
