// KL between two softmaxes whose scores lie side by side: (keys, kQueryBlock) of the student and of the teacher, a row
// of the loss in every lane. Included once per instruction set.
namespace bertops::BERTOPS_ISA {

// One number for every query of a block.
template <class T>
struct ModelRows {
  T *top_s, *top_t;  // maximum of S and T so far, in units of log 2
  T *sum_s, *sum_t;  // of exp(S - top_s) and exp(T - top_t)
  T* excess;         // sum of exp(S - top_s) - exp(T - top_t)
  T* drift;          // sum of exp(T - top_t) ((S - top_s) - (T - top_t)) / ln 2
};

template <class T>
inline void raise_tops(int64_t keys, int64_t columns, const T* scores, T* top) {
  for (int64_t column = 0; column < columns; column += kLanes<T>) {
    Vec<T> now = load(top + column);
    for (int64_t key = 0; key < keys; ++key) now = max<T>(now, load(scores + key * kQueryBlock + column));
    store(top + column, now);
  }
}

// S and T (keys, queries) become exp(S - top_s) and exp(T - top_t), and join the sums of their rows. Only the larger
// of the two is an exponential of its own, the other is its multiple by exp(-|v|): where both models agree they
// agree in every bit, and `excess` keeps the digits that the difference of two exponentials would lose.
template <class T>
inline void exponentials(int64_t keys, int64_t columns, T* scores_s, T* scores_t, const ModelRows<T>& rows) {
  for (int64_t column = 0; column < columns; column += kLanes<T>) {
    const Vec<T> top_s = load(rows.top_s + column), top_t = load(rows.top_t + column);
    Vec<T> sum_s{}, sum_t{}, excess{}, drift{};
    for (int64_t key = 0; key < keys; ++key) {
      const int64_t at = key * kQueryBlock + column;
      const Vec<T> s = load(scores_s + at) - top_s, t = load(scores_t + at) - top_t;
      const Vec<T> v = s - t;
      const auto student_larger = v > T(0);
      const Vec<T> larger = exp2(student_larger ? s : t);
      const Exp2<T> ratio = exp2_and_less_one(student_larger ? -v : v);
      const Vec<T> smaller = larger * ratio.value, difference = larger * ratio.less_one;
      const Vec<T> exp_s = student_larger ? larger : smaller, exp_t = student_larger ? smaller : larger;
      sum_s += exp_s;
      sum_t += exp_t;
      excess += student_larger ? -difference : difference;
      drift += exp_t * v;
      store(scores_s + at, exp_s);
      store(scores_t + at, exp_t);
    }
    store(rows.sum_s + column, load(rows.sum_s + column) + sum_s);
    store(rows.sum_t + column, load(rows.sum_t + column) + sum_t);
    store(rows.excess + column, load(rows.excess + column) + excess);
    store(rows.drift + column, load(rows.drift + column) + drift);
  }
}

// KL = ln(E_t[exp v]) - E_t[v], E_t the mean over the teacher's probabilities: no lse is subtracted from another.
template <class T>
inline T divergence(const ModelRows<T>& rows, int64_t i) {
  const T sum_t = rows.sum_t[i], excess = rows.excess[i] / sum_t;
  const bool close = excess > T(-0.5) && excess < T(0.5);
  const double log_mean = close ? __builtin_log1p(excess) : __builtin_log(rows.sum_s[i] / sum_t);
  return static_cast<T>(log_mean - kLn2 * (rows.drift[i] / sum_t));
}

// What turns the exponentials of a row into dS = factor (near exp(S) - exp(T) + far exp(S)). With near 1 and far
// the small rest of sum_t / sum_s where the sums are close, no digits are lost where the probabilities are.
template <class T>
struct GradRows {
  T *near, *far, *factor;
};

template <class T>
inline void set_grad_row(const ModelRows<T>& rows, int64_t i, T upstream, const GradRows<T>& grad) {
  const T rest = rows.excess[i] / rows.sum_s[i];
  const bool close = rest > T(-0.5) && rest < T(0.5);
  grad.near[i] = close ? T(1) : rows.sum_t[i] / rows.sum_s[i];
  grad.far[i] = close ? -rest : T(0);
  grad.factor[i] = upstream / rows.sum_t[i];
}

// dS of some rows: 0 where both models agree in every bit, whatever the compiler fuses.
template <class T>
BERTOPS_INLINE Vec<T> score_grad(Vec<T> exp_s, Vec<T> exp_t, Vec<T> near, Vec<T> far, Vec<T> factor) {
  const Vec<T> difference = exp_s * near - exp_t;
  return (exp_s * far + difference) * factor;
}

// dS into S.
template <class T>
inline void score_grads(int64_t keys, int64_t columns, T* scores_s, const T* scores_t,
                        const GradRows<T>& rows) {
  for (int64_t column = 0; column < columns; column += kLanes<T>) {
    const Vec<T> near = load(rows.near + column), far = load(rows.far + column);
    const Vec<T> factor = load(rows.factor + column);
    for (int64_t key = 0; key < keys; ++key) {
      const int64_t at = key * kQueryBlock + column;
      store(scores_s + at, score_grad<T>(load(scores_s + at), load(scores_t + at), near, far, factor));
    }
  }
}

}  // namespace bertops::BERTOPS_ISA
