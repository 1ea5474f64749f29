// Attention forward over one head: keys stream past a block of queries, with the running softmax of Milakov and
// Gimelshein (2018) as in FlashAttention. Included once per instruction set.
namespace bertops::BERTOPS_ISA {

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

// The largest score of every query in a vector of them, in four chains: one would wait for each comparison.
template <class T>
inline Vec<T> largest(int64_t keys, const T* scores, Vec<T> start) {
  Vec<T> most[4] = {start, start, start, start};
  int64_t key = 0;
  for (; key + 4 <= keys; key += 4) {
#pragma GCC unroll 4
    for (int n = 0; n < 4; ++n) most[n] = max<T>(most[n], load(scores + (key + n) * kQueryBlock));
  }
  for (; key < keys; ++key) most[0] = max<T>(most[0], load(scores + key * kQueryBlock));
  return max<T>(max<T>(most[0], most[1]), max<T>(most[2], most[3]));
}

// Scores become exp(score - maximum); returns their sum, which has four parts: short sums keep their bits.
template <class T>
inline Vec<T> exponentials(int64_t keys, Vec<T> maximum, T* scores) {
  const T log2e = static_cast<T>(kLog2E);
  Vec<T> total[4] = {};
  int64_t key = 0;
  const auto take = [&](int64_t at, Vec<T>& sum) {
    T* s = scores + at * kQueryBlock;
    const Vec<T> prob = exp2((load(s) - maximum) * log2e);
    sum += prob;
    store(s, prob);
  };
  for (; key + 4 <= keys; key += 4) {
#pragma GCC unroll 4
    for (int n = 0; n < 4; ++n) take(key + n, total[n]);
  }
  for (; key < keys; ++key) take(key, total[0]);
  return (total[0] + total[1]) + (total[2] + total[3]);
}

// One block of keys into the running softmax: S (keys, queries) becomes P relative to the new maximum, and the
// sums and the outputs so far move to that maximum.
template <class T>
inline void softmax_step(int64_t keys, int64_t columns, int64_t width, T* scores, T* maximum, T* sum,
                         T* out) {
  for (int64_t column = 0; column < columns; column += kLanes<T>) {
    const Vec<T> before = load(maximum + column), now = largest(keys, scores + column, before);
    // a window may hide the whole block from a query: its maximum is still -inf, and -inf - -inf is NaN
    const Vec<T> finite = now == -__builtin_inf() ? Vec<T>{} : now;
    const Vec<T> decay = exp2((before - finite) * static_cast<T>(kLog2E));
    for (int64_t d = 0; d < width; ++d) {
      T* o = out + d * kQueryBlock + column;
      store(o, load(o) * decay);
    }
    store(maximum + column, now);
    store(sum + column, load(sum + column) * decay + exponentials(keys, finite, scores + column));
  }
}

template <class T>
void attention_forward(const Attention& p, const HeadTask& task, void* memory) {
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

}  // namespace bertops::BERTOPS_ISA
