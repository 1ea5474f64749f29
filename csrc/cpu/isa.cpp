#include "cpu/isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace bertops {
namespace {

constexpr const char* kNames[] = {"baseline", "avx2", "avx512"};

Isa best() {
#ifdef __x86_64__
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512) return Isa::kAvx512;
  if (avx2) return Isa::kAvx2;
#endif
  return Isa::kBaseline;
}

Isa choose() {
  const char* wanted = std::getenv("BERTOPS_CPU_ISA");
  const Isa available = best();
  if (wanted == nullptr || *wanted == '\0') return available;
  for (int level = 0; level < 3; ++level) {
    if (std::string(wanted) != kNames[level]) continue;
    if (level > static_cast<int>(available)) {
      throw std::runtime_error("BERTOPS_CPU_ISA=" + std::string(wanted) + ", but this processor only has " +
                               kNames[static_cast<int>(available)]);
    }
    return static_cast<Isa>(level);
  }
  throw std::runtime_error("BERTOPS_CPU_ISA must be baseline, avx2 or avx512, got " + std::string(wanted));
}

}  // namespace

Isa cpu_isa() {
  static const Isa isa = choose();
  return isa;
}

const char* cpu_isa_name() { return kNames[static_cast<int>(cpu_isa())]; }

}  // namespace bertops
