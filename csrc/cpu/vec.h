// Vectors of one instruction set: loads, exponentials, logarithm, block transposes. Included once per instruction
// set, see foreach_isa.h; has no include guard for that reason.
namespace bertops::BERTOPS_ISA {

template <class T>
struct VecTypes {
  typedef T Vec __attribute__((vector_size(BERTOPS_VEC_BYTES)));
  typedef T Unaligned __attribute__((vector_size(BERTOPS_VEC_BYTES), aligned(alignof(T)), may_alias));
};
template <class T>
using Vec = typename VecTypes<T>::Vec;

template <class T>
constexpr int kLanes = BERTOPS_VEC_BYTES / sizeof(T);

template <class T>
BERTOPS_INLINE Vec<T> load(const T* from) {
  return *reinterpret_cast<const typename VecTypes<T>::Unaligned*>(from);
}

template <class T>
BERTOPS_INLINE void store(T* to, Vec<T> x) {
  *reinterpret_cast<typename VecTypes<T>::Unaligned*>(to) = x;
}

template <class T>
BERTOPS_INLINE Vec<T> broadcast(T x) {
  return x - Vec<T>{};  // not 0 + x, which is no identity for -0 and costs an addition
}

template <class T>
BERTOPS_INLINE T sum_of(Vec<T> x) {
  for (int half = kLanes<T> / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) x[lane] += x[lane + half];
  }
  return x[0];
}

BERTOPS_INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
BERTOPS_INLINE int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
BERTOPS_INLINE int64_t round_up(int64_t x, int64_t multiple) {
  return (x + multiple - 1) / multiple * multiple;
}

constexpr double kLog2E = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;

// 2^x, 2^x - 1 and 2^x - 1 - x ln 2, the latter two without the digits that subtracting would lose near 0.
template <class T>
struct Exp2 {
  Vec<T> value, less_one, less_line;
};

// (2^r - 1 - r ln 2) / r^2 for |r| <= 1/2: all of exp2_series but its constant.
BERTOPS_INLINE Vec<float> exp2_curve(Vec<float> r) {
  Vec<float> p = broadcast(1.53458121613e-4f);
  p = p * r + 1.33999311772e-3f;
  p = p * r + 9.61848895633e-3f;
  p = p * r + 5.55032877711e-2f;
  return p * r + 2.40226468906e-1f;
}

// (2^r - 1) / r for |r| <= 1/2: 2^r has relative error 2e-9, found by Remez exchange.
BERTOPS_INLINE Vec<float> exp2_series(Vec<float> curve, Vec<float> r) {
  return curve * r + 6.93147205737e-1f;
}

// For x up to 127: 0 and -1 below -126 (-inf too), NaN for NaN. x = n + r with |r| <= 1/2.
BERTOPS_INLINE Exp2<float> exp2_and_less_one(Vec<float> x) {
  typedef int32_t IntVec __attribute__((vector_size(BERTOPS_VEC_BYTES)));
  const float magic = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer in the low mantissa bits
  const Vec<float> shifted = x + magic;
  const Vec<float> n = shifted - magic, r = x - n, curve = exp2_curve(r), p = exp2_series(curve, r);
  const IntVec exponent = (reinterpret_cast<IntVec>(shifted) << 23) + (127 << 23);
  const Vec<float> power = reinterpret_cast<Vec<float>>(exponent);
  const auto none = x < -126.f;
  const Vec<float> less_one = none ? Vec<float>{} - 1.f : p * r * power + (power - 1.f);
  return {none ? Vec<float>{} : (p * r + 1.f) * power, less_one,
          n == 0.f ? curve * r * r : less_one - x * static_cast<float>(kLn2)};
}

BERTOPS_INLINE Exp2<double> exp2_and_less_one(Vec<double> x) {
  Exp2<double> result{};
  for (int lane = 0; lane < kLanes<double>; ++lane) {
    result.value[lane] = __builtin_exp2(x[lane]);
    result.less_one[lane] = __builtin_expm1(x[lane] * kLn2);
    result.less_line[lane] = result.less_one[lane] - x[lane] * kLn2;
  }
  return result;
}

#if BERTOPS_ISA_LEVEL == 2
// The same value: x = n + r with 0 <= r < 1, the series of 2^r has relative error 2e-9, and scaling by 2^n is one
// instruction, as is x less the integer below it.
BERTOPS_INLINE Vec<float> exp2(Vec<float> x) {
  constexpr int kFloor = 0x09;
  const Vec<float> r = _mm512_reduce_ps(x, kFloor);
  Vec<float> p = broadcast(2.16129159441e-4f);
  p = p * r + 1.246784617387e-3f;
  p = p * r + 9.675451593586e-3f;
  p = p * r + 5.548528060795e-2f;
  p = p * r + 2.402293055535e-1f;
  p = p * r + 6.931470444434e-1f;
  p = p * r + 1.f;
  return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, broadcast(-126.f), _CMP_NLT_UQ), p, x);
}
#else
BERTOPS_INLINE Vec<float> exp2(Vec<float> x) { return exp2_and_less_one(x).value; }
#endif

BERTOPS_INLINE Vec<double> exp2(Vec<double> x) {
  Vec<double> p{};
  for (int lane = 0; lane < kLanes<double>; ++lane) p[lane] = __builtin_exp2(x[lane]);
  return p;
}

// e^x for x up to 88, within 2 units in the last place: 0 below -87.3 (-inf too), NaN for NaN. x = n ln 2 + r, where
// n times the first part of ln 2 is exact.
BERTOPS_INLINE Vec<float> exp(Vec<float> x) {
  typedef int32_t IntVec __attribute__((vector_size(BERTOPS_VEC_BYTES)));
  const float magic = 12582912.f;  // see exp2_and_less_one
  const Vec<float> shifted = x * static_cast<float>(kLog2E) + magic, n = shifted - magic;
  const Vec<float> r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  const IntVec exponent = (reinterpret_cast<IntVec>(shifted) << 23) + (127 << 23);
  const Vec<float> y = r * static_cast<float>(kLog2E);
  const Vec<float> value = (exp2_series(exp2_curve(y), y) * y + 1.f) * reinterpret_cast<Vec<float>>(exponent);
  return x < -87.3f ? Vec<float>{} : value;
}

BERTOPS_INLINE Vec<double> exp(Vec<double> x) {
  Vec<double> p{};
  for (int lane = 0; lane < kLanes<double>; ++lane) p[lane] = __builtin_exp(x[lane]);
  return p;
}

// ln(1 + x) for x >= 0 up to 2^24, within 2 units in the last place: 1 + x = 2^k (1 + f) with 1 + f from sqrt(1/2) to
// sqrt(2), ln(1 + f) = 2 artanh(f / (2 + f)) by its series, and what 1 + x rounded away is added to first order.
BERTOPS_INLINE Vec<float> log1p(Vec<float> x) {
  typedef int32_t IntVec __attribute__((vector_size(BERTOPS_VEC_BYTES)));
  const int32_t sqrt_half = 0x3F3504F3, one = 0x3F800000;
  const Vec<float> y = x + 1.f;
  const IntVec bits = reinterpret_cast<IntVec>(y) + (one - sqrt_half);
  const Vec<float> k = __builtin_convertvector((bits >> 23) - 127, Vec<float>);
  const IntVec mantissa = (bits & 0x7FFFFF) + sqrt_half;
  const Vec<float> f = reinterpret_cast<Vec<float>>(mantissa) - 1.f;
  const Vec<float> s = f / (f + 2.f), z = s * s;
  Vec<float> series = broadcast(2.f / 9.f);
  series = series * z + 2.f / 7.f;
  series = series * z + 2.f / 5.f;
  series = series * z + 2.f / 3.f;
  const Vec<float> small = k * -2.12194440e-4f + (s * z * series + (x - (y - 1.f)) / y);
  return k * 0.693359375f + (s * 2.f + small);
}

BERTOPS_INLINE Vec<double> log1p(Vec<double> x) {
  Vec<double> y{};
  for (int lane = 0; lane < kLanes<double>; ++lane) y[lane] = __builtin_log1p(x[lane]);
  return y;
}

template <class T>
BERTOPS_INLINE Vec<T> max(Vec<T> a, Vec<T> b) {
  return a > b ? a : b;
}

template <int... kLane>
struct LaneList {};
template <int kCount, int... kLane>
struct MakeLanes : MakeLanes<kCount - 1, kCount - 1, kLane...> {};
template <int... kLane>
struct MakeLanes<0, kLane...> {
  typedef LaneList<kLane...> type;
};

// One butterfly step of a block transpose: where bit kStep of a lane is set, it trades places with the partner row.
template <int kStep, class T, int... kLane>
BERTOPS_INLINE void exchange(Vec<T>& a, Vec<T>& b, LaneList<kLane...>) {
  constexpr int lanes = sizeof...(kLane);
#ifdef __clang__
  const Vec<T> low = __builtin_shufflevector(a, b, ((kLane & kStep) ? lanes + kLane - kStep : kLane)...);
  b = __builtin_shufflevector(a, b, ((kLane & kStep) ? lanes + kLane : kLane + kStep)...);
#else
  typedef decltype(a == b) Indices;
  const Vec<T> low = __builtin_shuffle(a, b, Indices{((kLane & kStep) ? lanes + kLane - kStep : kLane)...});
  b = __builtin_shuffle(a, b, Indices{((kLane & kStep) ? lanes + kLane : kLane + kStep)...});
#endif
  a = low;
}

template <int kStep, class T>
BERTOPS_INLINE void transpose_steps(Vec<T>* rows) {
  if constexpr (kStep > 0) {
#pragma GCC unroll 16
    for (int row = 0; row < kLanes<T>; ++row) {
      if (!(row & kStep)) {
        exchange<kStep, T>(rows[row], rows[row + kStep], typename MakeLanes<kLanes<T>>::type{});
      }
    }
    transpose_steps<kStep / 2, T>(rows);
  }
}

// to (C, R) = from (R, C) transposed; R and C multiples of the vector length, both padded by the caller.
template <class T>
inline void transpose(const T* from, int64_t from_row, int64_t rows, int64_t columns, T* to, int64_t to_row) {
  constexpr int L = kLanes<T>;
  for (int64_t row = 0; row < rows; row += L) {
    for (int64_t column = 0; column < columns; column += L) {
      Vec<T> block[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) block[i] = load(from + (row + i) * from_row + column);
      transpose_steps<L / 2, T>(block);
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) store(to + (column + i) * to_row + row, block[i]);
    }
  }
}

}  // namespace bertops::BERTOPS_ISA
