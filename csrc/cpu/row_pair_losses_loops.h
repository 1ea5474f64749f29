// Losses between paired hidden states: the forward goes over a row in the first cache two or three times and keeps a
// few numbers of it, from which the backward forms the gradient element by element. Included once per instruction set.
namespace bertops::BERTOPS_ISA {

// A row where it stands or as a copy, with zeros behind its end.
template <class T>
BERTOPS_INLINE RowPart<T> whole_row(const RowPairs& p, const RowsOf& x, int64_t row, T* scratch) {
  return row_part(p, x, row, 0, p.width, T(0), scratch);
}

// The sums over `padded` elements of what step(element, sums) adds to each of kCount sums, in two chains.
template <int kCount, class T, class Step>
BERTOPS_INLINE void sum_row(int64_t padded, T (&sums)[kCount], const Step& step) {
  constexpr int L = kLanes<T>;
  Vec<T> even[kCount] = {}, odd[kCount] = {};
  int64_t i = 0;
  for (; i + 2 * L <= padded; i += 2 * L) {
    step(i, even);
    step(i + L, odd);
  }
  if (i < padded) step(i, even);
  for (int k = 0; k < kCount; ++k) sums[k] = sum_of<T>(even[k] + odd[k]);
}

// ---- cosine_loss, normalized_mse: from s - ratio t, where ratio t is as long as s

template <class T>
struct DirectionStats {
  T inverse;  // 1 / |s|; 0 for a zero vector
  T ratio;    // |s| / |t|; 0 for a zero t
  T along;    // (s - ratio t) . s / |s|^2 = 1 - cos; taking it as a sum keeps the gradient orthogonal to s
};

template <class T>
void direction_rows(const RowPairs& p, bool cosine, int64_t first, int64_t last, void* memory) {
  T* scratch = static_cast<T*>(memory);
  for (int64_t row = first; row < last; ++row) {
    DirectionStats<T>& stats = static_cast<DirectionStats<T>*>(p.stats)[row];
    T& result = static_cast<T*>(p.rows)[row];
    stats = {};
    result = 0;
    if (!p.real(row)) continue;
    const RowPart<T> s = whole_row(p, p.s, row, scratch),
                     t = whole_row(p, p.t, row, scratch + padded(p.width));
    T squares[2], products[2];
    sum_row(s.padded, squares, [&](int64_t i, Vec<T>* sums) {
      const Vec<T> x = load(s.data + i), y = load(t.data + i);
      sums[0] += x * x;
      sums[1] += y * y;
    });
    const T length_s = __builtin_sqrt(squares[0]), length_t = __builtin_sqrt(squares[1]);
    const bool zero_s = length_s < p.option, zero_t = length_t < p.option;
    if (zero_s || zero_t) {
      stats = {zero_s ? T(0) : 1 / length_s, T(0), T(1)};
      result = cosine || zero_s != zero_t ? 1 : 0;
      continue;
    }
    const T ratio = length_s / length_t;
    sum_row(s.padded, products, [&](int64_t i, Vec<T>* sums) {
      const Vec<T> x = load(s.data + i), d = x - load(t.data + i) * ratio;
      sums[0] += d * d;
      sums[1] += d * x;
    });
    const T distance = products[0] / squares[0];
    stats = {1 / length_s, ratio, products[1] / squares[0]};
    result = cosine ? distance / 2 : distance;
  }
}

template <class T>
void direction_grads(const RowPairs& p, bool cosine, int64_t first, int64_t last, void* memory) {
  T* scratch = static_cast<T*>(memory);
  for (int64_t row = first; row < last; ++row) {
    if (!p.real(row)) {
      clear_grads(p, row);
      continue;
    }
    const RowPart<T> s = whole_row(p, p.s, row, scratch),
                     t = whole_row(p, p.t, row, scratch + padded(p.width));
    const DirectionStats<T> stats = static_cast<const DirectionStats<T>*>(p.stats)[row];
    const T factor = (cosine ? 1 : 2) * upstream<T>(p, 0, row) * stats.inverse * stats.inverse;
    store_grads(p, row, 0, s, [&](int64_t i) {
      const Vec<T> x = load(s.data + i), d = x - load(t.data + i) * stats.ratio;
      return (d - x * stats.along) * factor;
    });
  }
}

// ---- feature_map_transfer

template <class T>
struct FeatureStats {
  T mean_s, mean_t;
  T inverse;          // 1 / deviation of s
  T ratio;            // deviation of s / deviation of t
  T along;            // mean of (normed s - normed t) * normed s
  T mean_difference;  // of s - t
  T sign;             // of the difference of variances
};

template <class T>
void feature_rows(const RowPairs& p, int64_t first, int64_t last, void* memory) {
  T* scratch = static_cast<T*>(memory);
  T* rows = static_cast<T*>(p.rows);
  const T width = static_cast<T>(p.width), eps = static_cast<T>(p.option);
  for (int64_t row = first; row < last; ++row) {
    FeatureStats<T>& stats = static_cast<FeatureStats<T>*>(p.stats)[row];
    stats = {};
    rows[row] = rows[p.count + row] = rows[2 * p.count + row] = 0;
    if (!p.real(row)) continue;
    RowPart<T> s = whole_row(p, p.s, row, scratch), t = whole_row(p, p.t, row, scratch + padded(p.width));
    T means[3], variances[3], products[2];
    sum_row(s.padded, means, [&](int64_t i, Vec<T>* sums) {
      const Vec<T> x = load(s.data + i), y = load(t.data + i);
      sums[0] += x;
      sums[1] += y;
      sums[2] += x - y;
    });
    const T mean_s = means[0] / width, mean_t = means[1] / width, mean_difference = means[2] / width;
    s.pad(mean_s);
    t.pad(mean_t);
    sum_row(s.padded, variances, [&](int64_t i, Vec<T>* sums) {
      const Vec<T> x = load(s.data + i) - mean_s, y = load(t.data + i) - mean_t;
      sums[0] += x * x;
      sums[1] += y * y;
      sums[2] += (x - y) * (x + y);
    });
    const T inverse = 1 / __builtin_sqrt(variances[0] / width + eps);
    const T ratio = __builtin_sqrt((variances[0] / width + eps) / (variances[1] / width + eps));
    sum_row(s.padded, products, [&](int64_t i, Vec<T>* sums) {
      const Vec<T> x = load(s.data + i) - mean_s, d = x - (load(t.data + i) - mean_t) * ratio;
      sums[0] += d * d;
      sums[1] += d * x;
    });
    const T unit = inverse * inverse / width, variance_difference = variances[2] / width;
    const T sign = variance_difference > 0 ? 1 : variance_difference < 0 ? -1 : 0;
    stats = {mean_s, mean_t, inverse, ratio, products[1] * unit, mean_difference, sign};
    rows[row] = products[0] * unit;
    rows[p.count + row] = mean_difference * mean_difference;
    rows[2 * p.count + row] = __builtin_fabs(variance_difference);
  }
}

template <class T>
void feature_grads(const RowPairs& p, int64_t first, int64_t last, void* memory) {
  T* scratch = static_cast<T*>(memory);
  for (int64_t row = first; row < last; ++row) {
    if (!p.real(row)) {
      clear_grads(p, row);
      continue;
    }
    const RowPart<T> s = whole_row(p, p.s, row, scratch),
                     t = whole_row(p, p.t, row, scratch + padded(p.width));
    const FeatureStats<T> stats = static_cast<const FeatureStats<T>*>(p.stats)[row];
    const T twice = T(2) / static_cast<T>(p.width);
    const T normed = twice * upstream<T>(p, 0, row) * stats.inverse * stats.inverse;
    const T mean = twice * upstream<T>(p, 1, row) * stats.mean_difference;
    const T variance = twice * upstream<T>(p, 2, row) * stats.sign;
    store_grads(p, row, 0, s, [&](int64_t i) {
      const Vec<T> x = load(s.data + i) - stats.mean_s;
      const Vec<T> d = x - (load(t.data + i) - stats.mean_t) * stats.ratio;
      return (d - x * stats.along) * normed + (x * variance + mean);
    });
  }
}

}  // namespace bertops::BERTOPS_ISA
