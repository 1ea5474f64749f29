// Attention backward over one head: every tile of P comes again from Q, K and lse, and feeds dQ, dK and dV in one
// pass. Included once per instruction set.
namespace bertops::BERTOPS_ISA {

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
void attention_backward(const Attention& p, const HeadTask& task, void* memory) {
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
  T* dk = task.sums != nullptr ? static_cast<T*>(task.sums) : scratch.take(2 * rows * width);
  T* dv = dk + rows * width;
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
  if (task.sums == nullptr) {
    for (int64_t i = 0; i < count; ++i) {
      store_head_row(dk + i * width, T(1), p.dk, sequence, head, i, head_dim);
      store_head_row(dv + i * width, T(1), p.dv, sequence, head, i, head_dim);
    }
  }
}

// dK and dV of one head from the sums of its tasks, always in the same order.
template <class T>
void attention_reduce(const Attention& p, const HeadTask* tasks, int64_t count) {
  const Sequence& sequence = *tasks[0].sequence;
  const int64_t width = round_up(p.head_dim, kLanes<T>), rows = round_up(sequence.count, kPadding);
  T* dk = add_parts<T>(tasks, count, 2 * rows * width);
  for (int64_t i = 0; i < sequence.count; ++i) {
    store_head_row(dk + i * width, T(1), p.dk, sequence, tasks[0].head, i, p.head_dim);
    store_head_row(dk + (rows + i) * width, T(1), p.dv, sequence, tasks[0].head, i, p.head_dim);
  }
}

}  // namespace bertops::BERTOPS_ISA
