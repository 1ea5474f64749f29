// What only attention has: windows and dropout. Included once per instruction set.
namespace bertops::BERTOPS_ISA {

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

}  // namespace bertops::BERTOPS_ISA
