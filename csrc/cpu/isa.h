// Which instruction set this process runs on.
#pragma once

namespace bertops {

enum class Isa { kBaseline = 0, kAvx2 = 1, kAvx512 = 2 };

// The best one that the processor has, or the lower one named by BERTOPS_CPU_ISA (baseline, avx2, avx512).
Isa cpu_isa();
const char* cpu_isa_name();

}  // namespace bertops

// Calls `function` of the namespace that belongs to this processor.
#ifdef __x86_64__
#define BERTOPS_CALL_ISA(function, ...)                                                \
  switch (::bertops::cpu_isa()) {                                                      \
    case ::bertops::Isa::kAvx512: ::bertops::avx512::function(__VA_ARGS__); break;     \
    case ::bertops::Isa::kAvx2: ::bertops::avx2::function(__VA_ARGS__); break;         \
    case ::bertops::Isa::kBaseline: ::bertops::baseline::function(__VA_ARGS__); break; \
  }
#else
#define BERTOPS_CALL_ISA(function, ...) ::bertops::baseline::function(__VA_ARGS__)
#endif
