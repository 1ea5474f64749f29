// KL between the softmax of paired rows, block by block of classes: from the ratios exp(v) of student to teacher, v the
// difference of their logits, so that close models keep their digits. Included once per instruction set.
namespace bertops::BERTOPS_ISA {

template <class T>
constexpr T kLowest = sizeof(T) == 4 ? -126 : -1022;  // 2^x is a normal number from here
template <class T>
constexpr T kImpossible = sizeof(T) == 4 ? -200 : -2000;  // and 0 here
constexpr int kHighest = 60;                              // above the reference points: far from overflow

// Logits of both models in units of log 2, from a reference point near the largest of the row.
template <class T>
struct KlStats {
  T top_s, top_t;          // the reference points
  T inverse_s, inverse_t;  // 1 / sum of 2^a and of 2^b
  T shift;                 // log2 of the ratio of the sums
};

template <class T>
struct Logits {
  Vec<T> a, b;
};

// Where the teacher has no probability, both are no lower than kImpossible: of two impossible classes -inf - -inf
// would be NaN. A class that the student alone rules out stays at -inf.
template <class T>
BERTOPS_INLINE Logits<T> logits_of(Vec<T> s, Vec<T> t, T top_s, T top_t, T unit) {
  const Vec<T> a = (s - top_s) * unit, b = (t - top_t) * unit, floor = broadcast(kImpossible<T>);
  const auto none = b < kLowest<T>;
  return {none & (a < floor) ? floor : a, none ? floor : b};
}

template <class T>
BERTOPS_INLINE T largest_of(const RowPart<T>& part) {
  Vec<T> top = load(part.data);
  for (int64_t i = kLanes<T>; i < part.padded; i += kLanes<T>) top = max<T>(top, load(part.data + i));
  T largest = top[0];
  for (int lane = 1; lane < kLanes<T>; ++lane) largest = largest > top[lane] ? largest : top[lane];
  return largest;
}

// The largest of the first `count` elements of a row.
template <class T>
inline T top_of(const RowPairs& p, const RowsOf& x, int64_t row, int64_t count, T* scratch) {
  const T none = static_cast<T>(-__builtin_inf());
  T top = none;
  for (int64_t first = 0; first < count; first += kClassBlock) {
    const T largest =
        largest_of(row_part(p, x, row, first, min_of(first + kClassBlock, count), none, scratch));
    top = top > largest ? top : largest;
  }
  return top;
}

struct KlSums {
  double student, teacher;  // of 2^a and 2^b
  double drift;             // of 2^b v, v = a - b
  double bend;              // of 2^b (2^v - 1 - v ln 2), no term of it negative
};

// False where a logit lies too far above the reference points.
template <class T>
inline bool add_classes(const RowPairs& p, int64_t row, T top_s, T top_t, T unit, T* scratch, KlSums& total) {
  const T none = static_cast<T>(-__builtin_inf()), ln2 = static_cast<T>(kLn2);
  total = {};
  for (int64_t first = 0; first < p.width; first += kClassBlock) {
    const int64_t last = min_of(first + kClassBlock, p.width);
    const RowPart<T> s = row_part(p, p.s, row, first, last, none, scratch);
    const RowPart<T> t = row_part(p, p.t, row, first, last, none, scratch + kClassBlock);
    Vec<T> student{}, teacher{}, drift{}, bend{}, highest{};
    for (int64_t i = 0; i < s.padded; i += kLanes<T>) {
      fetch_ahead(s, t, i);
      const Logits<T> z = logits_of<T>(load(s.data + i), load(t.data + i), top_s, top_t, unit);
      highest = max<T>(highest, max<T>(z.a, z.b));
      const Vec<T> v = z.a - z.b;
      const auto student_larger = v > T(0);
      const Vec<T> larger = exp2(student_larger ? z.a : z.b), u = student_larger ? -v : v;
      const Exp2<T> ratio = exp2_and_less_one(u);
      const Vec<T> smaller = larger * ratio.value, exp_t = student_larger ? smaller : larger;
      student += student_larger ? larger : smaller;
      teacher += exp_t;
      drift += exp_t * v;
      bend += larger * (student_larger ? u * ln2 * ratio.less_one - ratio.less_line : ratio.less_line);
    }
    for (int lane = 0; lane < kLanes<T>; ++lane) {
      if (highest[lane] > kHighest) return false;
    }
    total.student += sum_of<T>(student);
    total.teacher += sum_of<T>(teacher);
    total.drift += sum_of<T>(drift);
    total.bend += sum_of<T>(bend);
  }
  return true;
}

inline double drift_of(const KlSums& sums) { return kLn2 * sums.drift / sums.teacher; }

// KL = ln E[2^v] - E[v ln 2], E the mean over the teacher's probabilities, in nats. Where the models are close the
// logarithm is of 1 + x for a small x = bend + drift, and ln(1 + x) - x is of second order, as bend and KL are.
template <class T>
inline double divergence_of(const KlSums& sums, KlStats<T>& stats) {
  const double drift = drift_of(sums), bend = sums.bend / sums.teacher, x = bend + drift;
  const bool close = bend < 0.25 && drift > -0.25 && drift < 0.25;
  const double log_ratio = close ? __builtin_log1p(x) : __builtin_log(sums.student / sums.teacher);
  const double nats = close ? bend + (log_ratio - x) : log_ratio - drift;
  stats.inverse_s = static_cast<T>(1 / sums.student);
  stats.inverse_t = static_cast<T>(1 / sums.teacher);
  stats.shift = static_cast<T>(log_ratio / kLn2);
  return nats < 0 ? 0 : nats;  // negative by rounding alone
}

template <class T>
void kl_rows(const RowPairs& p, int64_t first, int64_t last, void* memory) {
  T* scratch = static_cast<T*>(memory);
  const T unit = static_cast<T>(kLog2E / p.option);
  for (int64_t row = first; row < last; ++row) {
    KlStats<T>& stats = static_cast<KlStats<T>*>(p.stats)[row];
    T& result = static_cast<T*>(p.rows)[row];
    stats = {};
    result = 0;
    if (!p.real(row)) continue;
    KlSums sums;
    // the largest logits of the first block are near enough to those of the row, nearly always
    for (int64_t seen = min_of(kClassBlock, p.width);; seen = p.width) {
      stats.top_s = top_of(p, p.s, row, seen, scratch);
      stats.top_t = top_of(p, p.t, row, seen, scratch);
      const bool any = stats.top_s > -__builtin_inf() && stats.top_t > -__builtin_inf();
      if ((any || seen == p.width) &&
          (add_classes(p, row, stats.top_s, stats.top_t, unit, scratch, sums) || seen == p.width)) {
        break;
      }
    }
    double nats = divergence_of(sums, stats);
    const double drift = drift_of(sums), far = drift < 0 ? -drift : drift;
    if (far > 0.25 && nats < far / 64) {  // the small rest of a difference: again, with ratios around 1
      KlStats<T> centered = stats;
      centered.top_s += static_cast<T>(drift * kLog2E / unit);
      if (add_classes(p, row, centered.top_s, centered.top_t, unit, scratch, sums)) {
        stats = centered;
        nats = divergence_of(sums, stats);
      }
    }
    result = static_cast<T>(p.option * p.option * nats);
  }
}

// T g (p_s - p_t), from the larger of the two: 0 where both models agree in every bit.
template <class T>
void kl_grads(const RowPairs& p, int64_t first, int64_t last, void* memory) {
  T* scratch = static_cast<T*>(memory);
  const T unit = static_cast<T>(kLog2E / p.option), none = static_cast<T>(-__builtin_inf());
  for (int64_t row = first; row < last; ++row) {
    if (!p.real(row)) {
      clear_grads(p, row);
      continue;
    }
    const KlStats<T> stats = static_cast<const KlStats<T>*>(p.stats)[row];
    const T factor = static_cast<T>(p.option) * upstream<T>(p, 0, row);
    const T factor_s = -factor * stats.inverse_s, factor_t = factor * stats.inverse_t;
    for (int64_t start = 0; start < p.width; start += kClassBlock) {
      const int64_t end = min_of(start + kClassBlock, p.width);
      const RowPart<T> s = row_part(p, p.s, row, start, end, none, scratch);
      const RowPart<T> t = row_part(p, p.t, row, start, end, none, scratch + kClassBlock);
      store_grads(p, row, start, s, [&](int64_t i) {
        fetch_ahead(s, t, i);
        const Logits<T> z = logits_of<T>(load(s.data + i), load(t.data + i), stats.top_s, stats.top_t, unit);
        const Vec<T> w = z.a - z.b - stats.shift;
        const auto student_larger = w > T(0);
        const Vec<T> larger = exp2(student_larger ? z.a : z.b);
        const Vec<T> less_one = exp2_and_less_one(student_larger ? -w : w).less_one;
        return larger * less_one * (student_larger ? broadcast(factor_s) : broadcast(factor_t));
      });
    }
  }
}

}  // namespace bertops::BERTOPS_ISA
