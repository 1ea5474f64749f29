// The dtypes that the CPU kernels read and write. They compute in fp64 for fp64 and in fp32 for all others.
#pragma once

#include <cstdint>

namespace bertops {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

enum class DType { kFloat, kDouble, kBFloat16, kFloat16 };

inline int64_t bytes_of(DType dtype) { return dtype == DType::kDouble ? 8 : dtype == DType::kFloat ? 4 : 2; }

// For processors without F16C, and for the tail of a row.
inline float half_to_float(Float16 x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16, exponent = (x.bits >> 10) & 31u, mantissa = x.bits & 0x3FFu;
  uint32_t bits;
  if (exponent == 31) {
    bits = sign | 0x7F800000u | (mantissa << 13);
  } else if (exponent != 0) {
    bits = sign | ((exponent + 112) << 23) | (mantissa << 13);
  } else {
    const float value = static_cast<float>(mantissa) * 0x1p-24f;
    return sign ? -value : value;
  }
  float value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}

inline Float16 float_to_half(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof(bits));
  const uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
  uint32_t half;
  if (magnitude > 0x7F800000u) {
    half = 0x7E00u;
  } else if (magnitude >= 0x477FF000u) {  // rounds to 65536 or more
    half = 0x7C00u;
  } else if (magnitude >= 0x38800000u) {  // normal: rebias the exponent, round to nearest even
    half = (magnitude - 0x38000000u + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
  } else {  // subnormal: adding 1/2 lets the addition round at 2^-24
    float value;
    __builtin_memcpy(&value, &magnitude, sizeof(value));
    value += 0.5f;
    __builtin_memcpy(&half, &value, sizeof(half));
    half -= 0x3F000000u;
  }
  return Float16{static_cast<uint16_t>(sign | half)};
}

}  // namespace bertops
