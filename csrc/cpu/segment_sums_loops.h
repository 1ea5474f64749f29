// The steps of segment sums: keys without a row, chunks of sorted rows, keys that reach over several. Included once
// per instruction set.
namespace bertops::BERTOPS_ISA {

// Keys [first, last) without a row become 0.
inline void clear_absent(const SegmentSums& s, int64_t first, int64_t last) {
  const int64_t bytes = s.width * bytes_of(s.dtype);
  for (int64_t k = first; k < last; ++k) {
    int64_t end = k;
    while (end < last && s.begin[end] == s.begin[end + 1]) ++end;
    if (end > k) __builtin_memset(static_cast<char*>(s.sums) + k * bytes, 0, (end - k) * bytes);
    k = end;
  }
}

// `sum` is (width) scratch.
template <class T>
void sum_chunk(const SegmentSums& s, int64_t chunk, void* memory) {
  const int64_t first = chunk * kRowsPerChunk, last = min_of(s.count, first + kRowsPerChunk), width = s.width;
  const T* rows = static_cast<const T*>(s.rows);
  T* scratch = static_cast<T*>(memory);
  for (int64_t i = first; i < last;) {
    const int64_t k = s.key[s.order[i]], end = s.begin[k + 1], stop = min_of(end, last);
    const bool before = s.begin[k]<first, after = end> last;
    const T* row = rows + s.order[i] * width;
    if (!before && !after && stop == i + 1) {
      store_as(s.dtype, row, width, T(1), s.sums, k * width);
      i = stop;
      continue;
    }
    T* sum = before || after ? static_cast<T*>(s.partial) + (2 * chunk + (before ? 0 : 1)) * width : scratch;
    load_row(row, 1, width, width, T(1), sum);
    for (++i; i < stop; ++i) add_row(sum, rows + s.order[i] * width, width, sum);
    if (!before && !after) store_as(s.dtype, sum, width, T(1), s.sums, k * width);
  }
}

// The key whose rows begin in `chunk` and go on after it, if there is one.
template <class T>
void join_chunks(const SegmentSums& s, int64_t chunk) {
  const int64_t first = chunk * kRowsPerChunk, last = first + kRowsPerChunk;
  if (last >= s.count) return;
  const int64_t k = s.key[s.order[last - 1]], end = s.begin[k + 1];
  if (s.begin[k] < first || end <= last) return;
  T* partial = static_cast<T*>(s.partial);
  T* sum = partial + (2 * chunk + 1) * s.width;
  for (int64_t other = chunk + 1; other * kRowsPerChunk < end; ++other) {
    add_row(sum, partial + 2 * other * s.width, s.width, sum);
  }
  store_as(s.dtype, sum, s.width, T(1), s.sums, k * s.width);
}

}  // namespace bertops::BERTOPS_ISA
