// One token of the embedding: its rows added up and normalised, and the way back. Rows in scratch are padded to whole
// vectors. Included once per instruction set.
namespace bertops::BERTOPS_ISA {

template <class T>
constexpr DType kDTypeOf = DType::kFloat;
template <>
constexpr DType kDTypeOf<double> = DType::kDouble;

// γ and behind it β (padded E each), 1 and 0 where they are missing, 0 beyond E.
template <class T>
void load_norm(const Table& weight, const Table& bias, const Embedding& p, void* memory) {
  const int64_t padded = padded_width(p);
  T *to = static_cast<T*>(memory), *to_bias = to + padded;
  for (int64_t i = 0; i < padded; ++i) to[i] = i < p.width, to_bias[i] = 0;
  if (weight.data != nullptr) load_as(weight.dtype, weight.data, 0, weight.stride, p.width, padded, T(1), to);
  if (bias.data != nullptr) load_as(bias.dtype, bias.data, 0, bias.stride, p.width, padded, T(1), to_bias);
}

// A row of a table where it stands, or converted into `memory`.
template <class T>
inline const T* table_row(const Table& table, int64_t row, int64_t width, T* memory) {
  const int64_t offset = row * table.row_stride;
  if (table.dtype == kDTypeOf<T>) return static_cast<const T*>(table.data) + offset;
  load_as(table.dtype, table.data, offset, 1, width, width, T(1), memory);
  return memory;
}

// Scratch of one token.
template <class T>
struct TokenRows {
  T *word, *position, *token_type, *factor;

  inline TokenRows(Scratch<T>& scratch, const Embedding& p) {
    const int64_t padded = padded_width(p);
    word = scratch.take(padded);
    position = scratch.take(padded);
    token_type = scratch.take(padded);
    factor = scratch.take(padded);
  }
};

// to[0..count) = x + y; y may be `to`.
template <class T>
inline void add_row(const T* x, const T* y, int64_t count, T* to) {
  int64_t i = 0;
  for (; i + kLanes<T> <= count; i += kLanes<T>) store(to + i, load(x + i) + load(y + i));
  for (; i < count; ++i) to[i] = x[i] + y[i];
}

// Words are anywhere in their table: the start of a row is on its way before it is needed, the rest follows.
inline void prefetch_word(const Embedding& p, int64_t token) {
  constexpr int64_t kAhead = 6, kMostBytes = 1024, kLine = 64;
  if (token + kAhead >= p.tokens) return;
  const int64_t bytes = bytes_of(p.word.dtype);
  const char* row =
      static_cast<const char*>(p.word.data) + p.word_row[token + kAhead] * p.word.row_stride * bytes;
  for (int64_t i = 0; i < min_of(kMostBytes, p.width * bytes); i += kLine) __builtin_prefetch(row + i);
}

// x (padded) = the rows of a token added up, 0 beyond E.
template <class T>
inline void gather(const Embedding& p, int64_t token, const TokenRows<T>& rows, T* x) {
  const int64_t width = p.width;
  prefetch_word(p, token);
  const T* sum = table_row(p.word, p.word_row[token], width, rows.word);
  if (p.position.data != nullptr) {
    add_row(sum, table_row(p.position, p.position_row[token], width, rows.position), width, x);
    sum = x;
  }
  if (p.token_type.data != nullptr) {
    add_row(sum, table_row(p.token_type, p.type_row[token], width, rows.token_type), width, x);
    sum = x;
  }
  if (sum != x) load_row(sum, 1, width, width, T(1), x);
  for (int64_t i = width; i < round_up(width, kLanes<T>); ++i) x[i] = 0;
}

template <class T>
struct Moments {
  T mean, rstd;
};

template <class T>
inline Moments<T> moments_of(const T* x, int64_t width, T eps) {
  constexpr int64_t L = kLanes<T>;
  Vec<T> sum{};
  for (int64_t i = 0; i < width; i += L) sum += load(x + i);  // 0 beyond E
  const T mean = sum_of<T>(sum) / static_cast<T>(width);
  Vec<T> squares{};
  int64_t i = 0;
  for (; i + L <= width; i += L) {
    const Vec<T> d = load(x + i) - mean;
    squares += d * d;
  }
  T rest = 0;
  for (; i < width; ++i) rest += (x[i] - mean) * (x[i] - mean);
  const T variance = (sum_of<T>(squares) + rest) / static_cast<T>(width);
  return {mean, T(1) / static_cast<T>(__builtin_sqrt(variance + eps))};
}

template <class T>
inline void normalise(int64_t width, Moments<T> m, T* x) {
  for (int64_t i = 0; i < width; i += kLanes<T>) store(x + i, (load(x + i) - m.mean) * m.rstd);
}

// What dropout multiplies the elements of a token with: 0 or 1 / (1 - p). Four in a row share one Philox call.
template <class T>
inline void dropout_factors(const Embedding& p, int64_t token, T* factor) {
  constexpr int64_t kGroups = 64;
  const Place place = p.places[token];
  const T scale = static_cast<T>(p.keep_scale);
  const int64_t groups =
      round_up(p.width, kPadding) / 4;  // the padding too: what stands there must be finite
  alignas(64) uint32_t words[4][kGroups];
  for (int64_t first = 0; first < groups; first += kGroups) {
    const int64_t count = min_of(kGroups, groups - first);
    for (int64_t g = 0; g < count; ++g) {
      uint32_t word[4] = {static_cast<uint32_t>(first + g), static_cast<uint32_t>(place.column), 0,
                          static_cast<uint32_t>(place.sequence)};
      philox(p.seed, word);
      for (int w = 0; w < 4; ++w) words[w][g] = word[w];
    }
    for (int64_t g = 0; g < count; ++g) {
      for (int w = 0; w < 4; ++w) factor[4 * (first + g) + w] = words[w][g] >= p.keep_from ? scale : T(0);
    }
  }
}

// What is dropped becomes 0, whatever it was.
template <class T>
BERTOPS_INLINE Vec<T> dropped(Vec<T> x, const T* factor) {
  const Vec<T> f = load(factor);
  return f == T(0) ? Vec<T>{} : x * f;
}

// Element i of y, from that of the normalised row.
template <class T>
BERTOPS_INLINE Vec<T> affine(const Embedding& p, const T* normalised, const T* factor, int64_t i) {
  const Vec<T> y = load(normalised + i) * load(static_cast<const T*>(p.norm_weight) + i) +
                   load(static_cast<const T*>(p.norm_bias) + i);
  return p.places == nullptr ? y : dropped(y, factor + i);
}

// y (padded) of a token, and its moments.
template <class T>
inline void embed(const Embedding& p, int64_t token, const TokenRows<T>& rows, T* y) {
  gather(p, token, rows, y);
  const Moments<T> m = moments_of(y, p.width, static_cast<T>(p.eps));
  store_as(p.mean.dtype, &m.mean, 1, T(1), p.mean.data, token);
  store_as(p.rstd.dtype, &m.rstd, 1, T(1), p.rstd.data, token);
  normalise(p.width, m, y);
  if (p.places != nullptr) dropout_factors(p, token, rows.factor);
  for (int64_t i = 0; i < p.width; i += kLanes<T>) store(y + i, affine(p, y, rows.factor, i));
}

// The normalised row (padded) of a token, from the moments of the forward; returns 1 / σ.
template <class T>
inline T normalised_again(const Embedding& p, int64_t token, const TokenRows<T>& rows, T* x) {
  Moments<T> m;
  load_as(p.mean.dtype, p.mean.data, token, 1, 1, 1, T(1), &m.mean);
  load_as(p.rstd.dtype, p.rstd.data, token, 1, 1, 1, T(1), &m.rstd);
  gather(p, token, rows, x);
  normalise(p.width, m, x);
  return m.rstd;
}

}  // namespace bertops::BERTOPS_ISA
