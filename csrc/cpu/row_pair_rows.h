// Parts of paired rows, as whole vectors of the compute type. Included once per instruction set.
namespace bertops::BERTOPS_ISA {

// `count` elements where they stand if they are whole vectors of T already, else a copy: `own`.
template <class T>
struct RowPart {
  const T* data;
  T* own;
  int64_t count, padded;

  void pad(T value) {
    for (int64_t i = count; i < padded; ++i) own[i] = value;
  }
};

// Elements [first, last) of a row, with `rest` behind its end.
template <class T>
inline RowPart<T> row_part(const RowPairs& p, const RowsOf& x, int64_t row, int64_t first, int64_t last,
                           T rest, T* scratch) {
  const int64_t offset = p.offset(x, row) + first, count = last - first, padded = round_up(count, kLanes<T>);
  const bool of_type = x.dtype == (sizeof(T) == 4 ? DType::kFloat : DType::kDouble);
  if (of_type && padded == count) return {static_cast<const T*>(x.data) + offset, nullptr, count, padded};
  load_as(x.dtype, x.data, offset, 1, count, padded, T(1), scratch);
  RowPart<T> part{scratch, scratch, count, padded};
  part.pad(rest);
  return part;
}

// Asks for what follows in memory: the loops compute too much an element to reach that far ahead by themselves.
template <class T>
BERTOPS_INLINE void fetch_ahead(const RowPart<T>& s, const RowPart<T>& t, int64_t i) {
  constexpr int64_t kAhead = 2048 / sizeof(T);
  __builtin_prefetch(s.data + i + kAhead);
  __builtin_prefetch(t.data + i + kAhead);
}

// grad(element) for the part `s` of a row from `first` on, in the dtype of the student; a copy is overwritten.
template <class T, class Grad>
BERTOPS_INLINE void store_grads(const RowPairs& p, int64_t row, int64_t first, const RowPart<T>& s,
                                const Grad& grad) {
  const int64_t offset = row * p.width + first;
  T* to = s.own != nullptr ? s.own : static_cast<T*>(p.grad) + offset;
  for (int64_t i = 0; i < s.padded; i += kLanes<T>) store(to + i, grad(i));
  if (s.own != nullptr) store_as(p.s.dtype, to, s.count, T(1), p.grad, offset);
}

inline void clear_grads(const RowPairs& p, int64_t row) {
  const int64_t bytes = p.width * bytes_of(p.s.dtype);
  __builtin_memset(static_cast<char*>(p.grad) + row * bytes, 0, bytes);
}

template <class T>
BERTOPS_INLINE T upstream(const RowPairs& p, int64_t loss, int64_t row) {
  return static_cast<const T*>(p.grad_rows)[p.grad_offset(loss, row)];
}

}  // namespace bertops::BERTOPS_ISA
