// Tiles of one head: real rows in and out of scratch, and the products of a tile. Included once per instruction set.
namespace bertops::BERTOPS_ISA {

template <class T>
struct Scratch {
  T* next;
  BERTOPS_INLINE T* take(int64_t elements) {
    T* taken = next;
    next += round_up(elements, kPadding);
    return taken;
  }
};

BERTOPS_INLINE int64_t position_offset(const Heads& x, const Sequence& sequence, int64_t head,
                                       int64_t position) {
  return sequence.batch * x.batch_stride + head * x.head_stride + (sequence.begin + position) * x.row_stride;
}
BERTOPS_INLINE int64_t row_offset(const Heads& x, const Sequence& sequence, int64_t head, int64_t i) {
  return position_offset(x, sequence, head, sequence.position[i]);
}

// to (last - first, width) = scale * real rows [first, last), zero beyond the head dim.
template <class T>
inline void load_rows(const Heads& from, const Sequence& sequence, int64_t head, int64_t first, int64_t last,
                      int64_t head_dim, int64_t width, T scale, T* to) {
  for (int64_t i = first; i < last; ++i, to += width) {
    load_as(from.dtype, from.data, row_offset(from, sequence, head, i), from.dim_stride, head_dim, width,
            scale, to);
  }
}

template <class T>
inline void store_head_row(const T* from, T scale, const Heads& to, const Sequence& sequence, int64_t head,
                           int64_t i, int64_t head_dim) {
  store_as(to.dtype, from, head_dim, scale, to.data, row_offset(to, sequence, head, i));
}

template <class T>
inline void fill(T* to, int64_t count, T value) {
  for (int64_t i = 0; i < count; ++i) to[i] = value;
}

// `count` rows into panels (count / L, width, L): the rows of a panel side by side, as the broadcast operand of a
// product over the head dim. load_some(first, last, to) writes rows; `rows` is (L, width) scratch.
template <class T, class Load>
inline void fill_panels(int64_t count, int64_t width, T* rows, T* panels, const Load& load_some) {
  constexpr int64_t L = kLanes<T>;
  for (int64_t first = 0; first < count; first += L, panels += width * L) {
    const int64_t last = min_of(first + L, count);
    load_some(first, last, rows);
    fill(rows + (last - first) * width, (first + L - last) * width, T(0));
    transpose(rows, width, L, width, panels, L);
  }
}

// All real rows into panels.
template <class T>
inline void load_panels(const Heads& from, const Sequence& sequence, int64_t head, int64_t head_dim,
                        int64_t width, T* rows, T* panels) {
  fill_panels(sequence.count, width, rows, panels, [&](int64_t first, int64_t last, T* to) {
    load_rows(from, sequence, head, first, last, head_dim, width, T(1), to);
  });
}

// (width, kQueryBlock) = rows [first, last) transposed, zero beyond them. `rows` is (kQueryBlock, width).
template <class T>
inline void to_lanes(T* rows, int64_t count, int64_t width, T* lanes) {
  const int64_t rounded = round_up(count, kLanes<T>);
  fill(rows + count * width, (rounded - count) * width, T(0));
  transpose(rows, width, rounded, width, lanes, kQueryBlock);
}

// S (keys, queries) = K Q^T for keys [first, last) of the panels.
template <class T>
inline void scores_tile(const T* panels, int64_t first, int64_t last, int64_t head_dim, int64_t width,
                        const T* lanes, int64_t columns, T* scores) {
  constexpr int64_t L = kLanes<T>, R = kTileRows<T>;
  for (int64_t key = first; key < last; key += R, scores += R * kQueryBlock) {
    const T* a = panels + key / L * L * width + key % L;
    tile_row<1, false>(columns, head_dim, a, L, lanes, kQueryBlock, scores, kQueryBlock);
  }
}

// C (width, queries) += A^T S for A (keys, width): the output or dQ of every query, transposed.
template <class T>
inline void add_to_lanes(const T* rows, int64_t keys, int64_t width, const T* scores, int64_t columns,
                         T* lanes) {
  for (int64_t d = 0; d < width; d += kTileRows<T>) {
    tile_row<1, true>(columns, keys, rows + d, width, scores, kQueryBlock, lanes + d * kQueryBlock,
                      kQueryBlock);
  }
}

// C (keys, width) += S B for B (queries, width): dK or dV of every key.
template <class T>
inline void add_to_rows(const T* scores, int64_t keys, int64_t queries, const T* rows, int64_t width, T* to) {
  for (int64_t key = 0; key < keys; key += kTileRows<T>) {
    tile_row<kQueryBlock, true>(width, queries, scores + key * kQueryBlock, 1, rows, width, to + key * width,
                                width);
  }
}

// Adds the sums of all `count` tasks to those of the first, which it returns.
template <class T>
inline T* add_parts(const HeadTask* tasks, int64_t count, int64_t elements) {
  T* total = static_cast<T*>(tasks[0].sums);
  for (int64_t t = 1; t < count; ++t) {
    const T* part = static_cast<const T*>(tasks[t].sums);
    for (int64_t i = 0; i < elements; ++i) total[i] += part[i];
  }
  return total;
}

// Zeroes `count` elements of one row.
inline void clear_row(const Heads& x, int64_t offset, int64_t count) {
  const int64_t bytes = bytes_of(x.dtype);
  __builtin_memset(static_cast<char*>(x.data) + offset * bytes, 0, count * bytes);
}

// The first position from `position` on that is no real row; `next` follows it through the real rows.
inline int64_t next_unreal(const Sequence& sequence, int64_t position, int64_t& next) {
  while (next < sequence.count && sequence.position[next] == position) ++position, ++next;
  return position;
}

// Rows of the sequence that are not real: the first `count` elements become 0.
inline void clear_unreal(const Heads& to, const Sequence& sequence, int64_t head, int64_t count) {
  int64_t next = 0, position = -1;
  while ((position = next_unreal(sequence, position + 1, next)) < sequence.length) {
    clear_row(to, position_offset(to, sequence, head, position), count);
  }
}

}  // namespace bertops::BERTOPS_ISA
