// Rows between tensors of any dtype and stride and padded scratch in the compute type. Included once per
// instruction set.
namespace bertops::BERTOPS_ISA {

BERTOPS_INLINE float to_float(float x) { return x; }
BERTOPS_INLINE double to_float(double x) { return x; }
BERTOPS_INLINE float to_float(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}
BERTOPS_INLINE float to_float(Float16 x) { return half_to_float(x); }

BERTOPS_INLINE void from_float(float x, float* to) { *to = x; }
BERTOPS_INLINE void from_float(double x, double* to) { *to = x; }
BERTOPS_INLINE void from_float(double x, float* to) { *to = static_cast<float>(x); }
BERTOPS_INLINE void from_float(float x, double* to) { *to = x; }
BERTOPS_INLINE void from_float(float x, BFloat16* to) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof(bits));
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  to->bits = static_cast<uint16_t>(x != x ? 0x7FC0u : rounded);
}
BERTOPS_INLINE void from_float(float x, Float16* to) { *to = float_to_half(x); }
BERTOPS_INLINE void from_float(double x, BFloat16* to) { from_float(static_cast<float>(x), to); }
BERTOPS_INLINE void from_float(double x, Float16* to) { from_float(static_cast<float>(x), to); }

// to[0..count) = scale * from[0..count), to[count..padded) = 0.
template <class S, class T>
inline void load_row(const S* __restrict from, int64_t stride, int64_t count, int64_t padded, T scale,
                     T* __restrict to) {
  int64_t i = 0;
  if (stride == 1) {
    if constexpr (__is_same(S, T)) {
      for (; i + kLanes<T> <= count; i += kLanes<T>) store(to + i, load(from + i) * scale);
    }
#if BERTOPS_ISA_LEVEL >= 1
    if constexpr (__is_same(S, Float16) && __is_same(T, float)) {
      for (; i + 8 <= count; i += 8) {
        const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
        _mm256_storeu_ps(to + i, _mm256_mul_ps(_mm256_cvtph_ps(halves), _mm256_set1_ps(scale)));
      }
    }
#endif
    for (; i < count; ++i) to[i] = to_float(from[i]) * scale;
  } else {
    for (; i < count; ++i) to[i] = to_float(from[i * stride]) * scale;
  }
  for (; i < padded; ++i) to[i] = 0;
}

// to[0..count) = scale * from[0..count), rounded to the dtype of `to`.
template <class T, class S>
inline void store_row(const T* __restrict from, int64_t count, T scale, S* __restrict to) {
  int64_t i = 0;
  if constexpr (__is_same(S, T)) {
    for (; i + kLanes<T> <= count; i += kLanes<T>) store(to + i, load(from + i) * scale);
  }
#if BERTOPS_ISA_LEVEL >= 1
  if constexpr (__is_same(S, Float16) && __is_same(T, float)) {
    for (; i + 8 <= count; i += 8) {
      const __m256 x = _mm256_mul_ps(_mm256_loadu_ps(from + i), _mm256_set1_ps(scale));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
    }
  }
#endif
  for (; i < count; ++i) from_float(from[i] * scale, to + i);
}

// The same for a dtype known at run time; `offset` in elements.
template <class T>
inline void load_as(DType dtype, const void* from, int64_t offset, int64_t stride, int64_t count,
                    int64_t padded, T scale, T* to) {
  switch (dtype) {
    case DType::kFloat:
      return load_row(static_cast<const float*>(from) + offset, stride, count, padded, scale, to);
    case DType::kDouble:
      return load_row(static_cast<const double*>(from) + offset, stride, count, padded, scale, to);
    case DType::kBFloat16:
      return load_row(static_cast<const BFloat16*>(from) + offset, stride, count, padded, scale, to);
    case DType::kFloat16:
      return load_row(static_cast<const Float16*>(from) + offset, stride, count, padded, scale, to);
  }
}

template <class T>
inline void store_as(DType dtype, const T* from, int64_t count, T scale, void* to, int64_t offset) {
  switch (dtype) {
    case DType::kFloat: return store_row(from, count, scale, static_cast<float*>(to) + offset);
    case DType::kDouble: return store_row(from, count, scale, static_cast<double*>(to) + offset);
    case DType::kBFloat16: return store_row(from, count, scale, static_cast<BFloat16*>(to) + offset);
    case DType::kFloat16: return store_row(from, count, scale, static_cast<Float16*>(to) + offset);
  }
}

}  // namespace bertops::BERTOPS_ISA
