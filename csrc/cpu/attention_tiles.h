// Attention over one head, tile by tile, lanes of a vector along the queries: softmax then needs no sums across
// lanes, and K and V enter every product as the operand that is broadcast. Only real rows are loaded into
// scratch, so masked keys cost nothing and masked values are never read. Included once per instruction set.
#include "cpu/vec.h"

#include "cpu/rows.h"
#include "cpu/tile.h"

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

// Real rows into panels (count / L, width, L): the rows of a panel side by side, as the broadcast operand of a
// product over the head dim. `rows` is (L, width) scratch.
template <class T>
inline void load_panels(const Heads& from, const Sequence& sequence, int64_t head, int64_t head_dim,
                        int64_t width, T* rows, T* panels) {
  constexpr int64_t L = kLanes<T>;
  for (int64_t first = 0; first < sequence.count; first += L, panels += width * L) {
    const int64_t last = min_of(first + L, sequence.count);
    load_rows(from, sequence, head, first, last, head_dim, width, T(1), rows);
    fill(rows + (last - first) * width, (first + L - last) * width, T(0));
    transpose(rows, width, L, width, panels, L);
  }
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

// The keys [low, high) within the window of query i, as indices into the real rows.
struct Range {
  int64_t low, high;
};
inline Range window_of(const Sequence& sequence, int64_t window, int64_t i) {
  if (window < 0) return {0, sequence.count};
  const int64_t position = sequence.position[i];
  int64_t low = i, high = i + 1;
  if (sequence.dense) return {max_of(0, i - window), min_of(sequence.count, i + window + 1)};
  while (low > 0 && position - sequence.position[low - 1] <= window) --low;
  while (high < sequence.count && sequence.position[high] - position <= window) ++high;
  return {low, high};
}

// The queries [first, first + count) of a block, with the keys that any of them may see.
struct QueryBlock {
  int64_t first, count, columns;  // columns: count rounded up to whole vectors
  Range keys;                     // of any of its queries, rounded to whole panels
  Range range[kQueryBlock];

  inline bool sees_all(int64_t low, int64_t high) const {
    for (int64_t i = 0; i < count; ++i) {
      if (range[i].low > low || range[i].high < high) return false;
    }
    return true;
  }
};
template <class T>
inline void set_block(const Sequence& sequence, int64_t window, int64_t first, int64_t last,
                      QueryBlock& block) {
  block.first = first;
  block.count = min_of(kQueryBlock, last - first);
  block.columns = round_up(block.count, kLanes<T>);
  for (int64_t i = 0; i < block.count; ++i) block.range[i] = window_of(sequence, window, first + i);
  // whole panels: a product writes every row of its last one
  const int64_t low = block.range[0].low / kLanes<T> * kLanes<T>;
  const int64_t high = round_up(block.range[block.count - 1].high, kLanes<T>);
  block.keys = {low, min_of(high, sequence.count)};
}

// Entries of S (keys, queries) that a query's window leaves out become `value`.
template <class T>
inline void cut_window(const QueryBlock& block, int64_t first, int64_t last, T value, T* scores) {
  for (int64_t key = first; key < last; ++key, scores += kQueryBlock) {
    for (int64_t i = 0; i < block.count; ++i) {
      if (key < block.range[i].low || key >= block.range[i].high) scores[i] = value;
    }
  }
}

// Entries of P (keys, queries) that dropout takes become 0; four keys in a row share one Philox call.
template <class T>
inline void drop(const Attention& p, const Sequence& sequence, int64_t head, const QueryBlock& block,
                 int64_t first, int64_t last, T* probs) {
  alignas(64) uint32_t words[4][kQueryBlock];
  int64_t group = -1;
  for (int64_t key = first; key < last; ++key, probs += kQueryBlock) {
    const int64_t position = sequence.position[key];
    if (position / 4 != group) {
      group = position / 4;
      for (int64_t i = 0; i < block.count; ++i) {
        uint32_t word[4] = {static_cast<uint32_t>(group),
                            static_cast<uint32_t>(sequence.position[block.first + i]),
                            static_cast<uint32_t>(head), static_cast<uint32_t>(sequence.identity)};
        philox(p.seed, word);
        for (int w = 0; w < 4; ++w) words[w][i] = word[w];
      }
    }
    const uint32_t* word = words[position % 4];
    for (int64_t i = 0; i < block.count; ++i) probs[i] = word[i] >= p.keep_from ? probs[i] : T(0);
  }
}

// Zeroes `count` elements of one row.
inline void clear_row(const Heads& x, int64_t offset, int64_t count) {
  const int64_t bytes = bytes_of(x.dtype);
  __builtin_memset(static_cast<char*>(x.data) + offset * bytes, 0, count * bytes);
}

// Writes the map's part of keys [first, last): `scores` (keys, queries), `rows` (kQueryBlock, kKeyBlock) scratch.
template <class T>
inline void store_scores(const Attention& p, const Sequence& sequence, int64_t head, const QueryBlock& block,
                         int64_t first, int64_t last, const T* scores, T* rows) {
  transpose(scores, kQueryBlock, round_up(last - first, kLanes<T>), block.columns, rows, kKeyBlock);
  for (int64_t i = 0; i < block.count; ++i, rows += kKeyBlock) {
    const int64_t low = max_of(first, block.range[i].low), high = min_of(last, block.range[i].high);
    const int64_t to = row_offset(p.scores, sequence, head, block.first + i) + sequence.begin;
    if (sequence.dense) {
      if (low < high)
        store_as(p.scores.dtype, rows + (low - first), high - low, T(1), p.scores.data, to + low);
    } else {
      for (int64_t key = low; key < high; ++key) {
        store_as(p.scores.dtype, rows + (key - first), 1, T(1), p.scores.data, to + sequence.position[key]);
      }
    }
  }
}

// S (keys, queries) of the upstream gradient of the map; `rows` (kQueryBlock, kKeyBlock) scratch.
template <class T>
inline void load_grad_scores(const Attention& p, const Sequence& sequence, int64_t head,
                             const QueryBlock& block, int64_t first, int64_t last, T* rows, T* scores) {
  const Heads& from = p.grad_scores;
  fill(rows, kQueryBlock * kKeyBlock, T(0));
  for (int64_t i = 0; i < block.count; ++i) {
    T* row = rows + i * kKeyBlock - first;
    const int64_t low = max_of(first, block.range[i].low), high = min_of(last, block.range[i].high);
    const int64_t start =
        row_offset(from, sequence, head, block.first + i) + sequence.begin * from.dim_stride;
    if (sequence.dense && low < high) {
      const int64_t offset = start + low * from.dim_stride;
      load_as(from.dtype, from.data, offset, from.dim_stride, high - low, high - low, T(1), row + low);
    } else {
      for (int64_t key = low; key < high; ++key) {
        const int64_t offset = start + sequence.position[key] * from.dim_stride;
        load_as(from.dtype, from.data, offset, 1, 1, 1, T(1), row + key);
      }
    }
  }
  transpose(rows, kKeyBlock, block.columns, round_up(last - first, kLanes<T>), scores, kQueryBlock);
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

// One block of keys into the running softmax: S (keys, queries) becomes P relative to the new maximum, and the
// sums and the outputs so far move to that maximum.
template <class T>
inline void softmax_step(int64_t keys, int64_t columns, int64_t width, T* scores, T* maximum, T* sum,
                         T* out) {
  constexpr int64_t L = kLanes<T>;
  const T log2e = static_cast<T>(kLog2E);
  for (int64_t column = 0; column < columns; column += L) {
    const Vec<T> before = load(maximum + column);
    Vec<T> now = before;
    for (int64_t key = 0; key < keys; ++key) now = max<T>(now, load(scores + key * kQueryBlock + column));
    // a window may hide the whole block from a query: its maximum is still -inf, and -inf - -inf is NaN
    const Vec<T> finite = now == -__builtin_inf() ? Vec<T>{} : now;
    const Vec<T> decay = exp2((before - finite) * log2e);
    for (int64_t d = 0; d < width; ++d) {
      T* o = out + d * kQueryBlock + column;
      store(o, load(o) * decay);
    }
    store(maximum + column, now);
    Vec<T> total[4] = {};  // of every fourth key: short sums keep their bits
    for (int64_t key = 0; key < keys; ++key) {
      T* s = scores + key * kQueryBlock + column;
      const Vec<T> prob = exp2((load(s) - finite) * log2e);
      total[key % 4] += prob;
      store(s, prob);
    }
    store(sum + column, load(sum + column) * decay + ((total[0] + total[1]) + (total[2] + total[3])));
  }
}

template <class T>
void attention_forward(const Attention& p, const AttentionTask& task, void* memory) {
  const Sequence& sequence = *task.sequence;
  const int64_t width = round_up(p.head_dim, kLanes<T>), rows = round_up(sequence.count, kPadding);
  T* lse = static_cast<T*>(p.lse) + (sequence.batch * p.heads + task.head) * p.length + sequence.begin;
  if (task.first == 0 && !sequence.dense) {
    clear_unreal(p.out, sequence, task.head, p.head_dim);
    if (p.scores.data != nullptr) clear_unreal(p.scores, sequence, task.head, p.length);
    int64_t next = 0, position = -1;
    while ((position = next_unreal(sequence, position + 1, next)) < sequence.length) {
      lse[position] = static_cast<T>(-__builtin_inf());
    }
  }

  Scratch<T> scratch{static_cast<T*>(memory)};
  T* few_rows = scratch.take(kPadding * width);
  T* k = scratch.take(rows * width);  // panels
  T* v = scratch.take(rows * width);  // (keys, width)
  T* block_rows = scratch.take(kQueryBlock * width);
  T* q = scratch.take(kQueryBlock * width);    // (width, queries)
  T* out = scratch.take(kQueryBlock * width);  // (width, queries)
  T* scores = scratch.take(kKeyBlock * kQueryBlock);
  T* score_rows = scratch.take(kKeyBlock * kQueryBlock);
  T* maximum = scratch.take(kQueryBlock);
  T* sum = scratch.take(kQueryBlock);

  load_panels(p.k, sequence, task.head, p.head_dim, width, few_rows, k);
  load_rows(p.v, sequence, task.head, 0, sequence.count, p.head_dim, width, T(1), v);
  QueryBlock block;
  for (int64_t first = task.first; first < task.last; first += kQueryBlock) {
    set_block<T>(sequence, p.window, first, task.last, block);
    const int64_t columns = block.columns;
    load_rows(p.q, sequence, task.head, first, first + block.count, p.head_dim, width,
              static_cast<T>(p.scale), block_rows);
    to_lanes(block_rows, block.count, width, q);
    fill(out, width * kQueryBlock, T(0));
    fill(maximum, kQueryBlock, static_cast<T>(-__builtin_inf()));
    fill(sum, kQueryBlock, T(0));
    if (p.scores.data != nullptr && (p.window >= 0 || sequence.count < p.length)) {
      for (int64_t i = 0; i < block.count; ++i) {
        clear_row(p.scores, row_offset(p.scores, sequence, task.head, first + i), p.length);
      }
    }
    for (int64_t key = block.keys.low; key < block.keys.high; key += kKeyBlock) {
      const int64_t end = min_of(key + kKeyBlock, block.keys.high);
      scores_tile(k, key, end, p.head_dim, width, q, columns, scores);
      if (p.scores.data != nullptr) {
        store_scores(p, sequence, task.head, block, key, end, scores, score_rows);
      }
      if (p.window >= 0 && !block.sees_all(key, end)) {
        cut_window(block, key, end, static_cast<T>(-__builtin_inf()), scores);
      }
      softmax_step(end - key, columns, width, scores, maximum, sum, out);
      if (p.dropout_p > 0) drop(p, sequence, task.head, block, key, end, scores);
      add_to_lanes(v + key * width, end - key, width, scores, columns, out);
    }
    transpose(out, kQueryBlock, width, columns, block_rows, width);
    for (int64_t i = 0; i < block.count; ++i) {
      const T norm = static_cast<T>(1 / ((1 - p.dropout_p) * sum[i]));
      store_head_row(block_rows + i * width, norm, p.out, sequence, task.head, first + i, p.head_dim);
      lse[sequence.position[first + i]] = maximum[i] + static_cast<T>(__builtin_log(sum[i]));
    }
  }
}

// P (keys, queries) = exp(S - lse), in place.
template <class T>
inline void probabilities(int64_t keys, int64_t columns, const T* lse, T* scores) {
  const T log2e = static_cast<T>(kLog2E);
  for (int64_t column = 0; column < columns; column += kLanes<T>) {
    const Vec<T> shift = load(lse + column);
    for (int64_t key = 0; key < keys; ++key) {
      T* s = scores + key * kQueryBlock + column;
      store(s, exp2((load(s) - shift) * log2e));
    }
  }
}

// dS = P o (dP - delta) [+ the map's own gradient], into `grads`, which holds dP.
template <class T>
inline void score_gradients(int64_t keys, int64_t columns, const T* probs, const T* delta,
                            const T* grad_scores, T* grads) {
  for (int64_t column = 0; column < columns; column += kLanes<T>) {
    const Vec<T> shift = load(delta + column);
    for (int64_t key = 0; key < keys; ++key) {
      const int64_t at = key * kQueryBlock + column;
      Vec<T> grad = load(probs + at) * (load(grads + at) - shift);
      if (grad_scores != nullptr) grad += load(grad_scores + at);
      store(grads + at, grad);
    }
  }
}

// rowsum(dO o O), in the order in which the product dO V^T sums: a query with one key gets dP - delta = 0 exactly.
template <class T>
inline void row_dots(int64_t columns, int64_t width, const T* a, const T* b, T* dots) {
  for (int64_t column = 0; column < columns; column += kLanes<T>) {
    Vec<T> sum{};
    for (int64_t d = 0; d < width; ++d) {
      sum += load(a + d * kQueryBlock + column) * load(b + d * kQueryBlock + column);
    }
    store(dots + column, sum);
  }
}

template <class T>
void attention_backward(const Attention& p, const AttentionTask& task, void* memory) {
  const Sequence& sequence = *task.sequence;
  const int64_t head = task.head, head_dim = p.head_dim, count = sequence.count;
  const int64_t width = round_up(head_dim, kLanes<T>), rows = round_up(count, kPadding);
  const int64_t offset = (sequence.batch * p.heads + head) * p.length + sequence.begin;
  const T* lse = static_cast<const T*>(p.lse) + offset;
  const T* grad_lse = p.grad_lse == nullptr ? nullptr : static_cast<const T*>(p.grad_lse) + offset;
  if (task.first == 0 && !sequence.dense) {
    clear_unreal(p.dq, sequence, head, head_dim);
    clear_unreal(p.dk, sequence, head, head_dim);
    clear_unreal(p.dv, sequence, head, head_dim);
  }

  Scratch<T> scratch{static_cast<T*>(memory)};
  T* few_rows = scratch.take(kPadding * width);
  T* k = scratch.take(rows * width);  // (keys, width)
  T* k_panels = scratch.take(rows * width);
  T* v_panels = scratch.take(rows * width);
  T* dk = task.dk != nullptr ? static_cast<T*>(task.dk) : scratch.take(rows * width);
  T* dv = task.dv != nullptr ? static_cast<T*>(task.dv) : scratch.take(rows * width);
  T* q_rows = scratch.take(kQueryBlock * width);
  T* q = scratch.take(kQueryBlock * width);  // (width, queries), as are grad_out and dq
  T* grad_out_rows = scratch.take(kQueryBlock * width);
  T* grad_out = scratch.take(kQueryBlock * width);
  T* dq_rows = scratch.take(kQueryBlock * width);
  T* dq = scratch.take(kQueryBlock * width);
  T* probs = scratch.take(kKeyBlock * kQueryBlock);
  T* grads = scratch.take(kKeyBlock * kQueryBlock);
  T* map_rows = scratch.take(kKeyBlock * kQueryBlock);
  T* map = scratch.take(kKeyBlock * kQueryBlock);
  T* block_lse = scratch.take(kQueryBlock);
  T* delta = scratch.take(kQueryBlock);

  load_panels(p.k, sequence, head, head_dim, width, few_rows, k_panels);
  load_panels(p.v, sequence, head, head_dim, width, few_rows, v_panels);
  load_rows(p.k, sequence, head, 0, count, head_dim, width, T(1), k);
  fill(dk, rows * width, T(0));
  fill(dv, rows * width, T(0));
  const bool with_map = p.grad_scores.data != nullptr;
  const T keep_scale = static_cast<T>(1 / (1 - p.dropout_p));
  QueryBlock block;
  for (int64_t first = task.first; first < task.last; first += kQueryBlock) {
    set_block<T>(sequence, p.window, first, task.last, block);
    const int64_t columns = block.columns, last = first + block.count;
    load_rows(p.out, sequence, head, first, last, head_dim, width, T(1), dq_rows);
    // dropout divides P by 1 - p in both dP and dV: once here, on dO
    load_rows(p.grad_out, sequence, head, first, last, head_dim, width, keep_scale, grad_out_rows);
    load_rows(p.q, sequence, head, first, last, head_dim, width, static_cast<T>(p.scale), q_rows);
    to_lanes(q_rows, block.count, width, q);
    to_lanes(grad_out_rows, block.count, width, grad_out);
    to_lanes(dq_rows, block.count, width, dq);
    row_dots(columns, width, grad_out, dq, delta);
    fill(block_lse, kQueryBlock, T(0));
    for (int64_t i = 0; i < block.count; ++i) {
      const int64_t position = sequence.position[first + i];
      block_lse[i] = lse[position];
      delta[i] = delta[i] / keep_scale - (grad_lse == nullptr ? T(0) : grad_lse[position]);
    }
    fill(dq, width * kQueryBlock, T(0));
    for (int64_t key = block.keys.low; key < block.keys.high; key += kKeyBlock) {
      const int64_t end = min_of(key + kKeyBlock, block.keys.high), keys = end - key;
      scores_tile(k_panels, key, end, head_dim, width, q, columns, probs);
      scores_tile(v_panels, key, end, head_dim, width, grad_out, columns, grads);
      probabilities(keys, columns, block_lse, probs);
      if (p.window >= 0 && !block.sees_all(key, end)) cut_window(block, key, end, T(0), probs);
      if (with_map) load_grad_scores(p, sequence, head, block, key, end, map_rows, map);
      if (p.dropout_p > 0) drop(p, sequence, head, block, key, end, grads);
      score_gradients(keys, columns, probs, delta, with_map ? map : nullptr, grads);
      if (p.dropout_p > 0) drop(p, sequence, head, block, key, end, probs);
      // rows past the last key are scratch of the padding: sums there are never stored
      add_to_rows(probs, keys, block.count, grad_out_rows, width, dv + key * width);
      add_to_rows(grads, keys, block.count, q_rows, width, dk + key * width);
      add_to_lanes(k + key * width, keys, width, grads, columns, dq);
    }
    transpose(dq, kQueryBlock, width, columns, dq_rows, width);
    for (int64_t i = 0; i < block.count; ++i) {
      store_head_row(dq_rows + i * width, static_cast<T>(p.scale), p.dq, sequence, head, first + i, head_dim);
    }
  }
  if (task.dk == nullptr) {
    for (int64_t i = 0; i < count; ++i) {
      store_head_row(dk + i * width, T(1), p.dk, sequence, head, i, head_dim);
      store_head_row(dv + i * width, T(1), p.dv, sequence, head, i, head_dim);
    }
  }
}

// dK and dV of one head from the sums of its tasks, always in the same order.
template <class T>
void attention_reduce(const Attention& p, const AttentionTask* tasks, int64_t count) {
  const Sequence& sequence = *tasks[0].sequence;
  const int64_t width = round_up(p.head_dim, kLanes<T>);
  for (int64_t i = 0; i < sequence.count; ++i) {
    T* dk = static_cast<T*>(tasks[0].dk) + i * width;
    T* dv = static_cast<T*>(tasks[0].dv) + i * width;
    for (int64_t t = 1; t < count; ++t) {
      const T* more_dk = static_cast<const T*>(tasks[t].dk) + i * width;
      const T* more_dv = static_cast<const T*>(tasks[t].dv) + i * width;
      for (int64_t d = 0; d < width; ++d) {
        dk[d] += more_dk[d];
        dv[d] += more_dv[d];
      }
    }
    store_head_row(dk, T(1), p.dk, sequence, tasks[0].head, i, p.head_dim);
    store_head_row(dv, T(1), p.dv, sequence, tasks[0].head, i, p.head_dim);
  }
}

}  // namespace bertops::BERTOPS_ISA
