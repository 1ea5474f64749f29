// KL between the attention of two models over one head, with its gradient where one is wanted. The scores of a block
// of queries against all keys, of both models, stay in scratch: (N, kQueryBlock) each, linear in N. A softmax then
// sees its maximum before its first exponential, and no score is computed twice. Included once per instruction set,
// after divergence_rows.h.
namespace bertops::BERTOPS_ISA {

// Rows that are not real: loss 0, lse -inf, gradient 0.
template <class T>
inline void clear_unreal_rows(const Divergence& p, const Sequence& sequence, int64_t head, int64_t offset) {
  if (p.dq.data != nullptr) clear_unreal(p.dq, sequence, head, p.head_dim_s);
  if (p.dk.data != nullptr) clear_unreal(p.dk, sequence, head, p.head_dim_s);
  int64_t next = 0, position = -1;
  while ((position = next_unreal(sequence, position + 1, next)) < sequence.length) {
    if (p.rows != nullptr) static_cast<T*>(p.rows)[offset + position] = 0;
    if (p.lse_s != nullptr) {
      static_cast<T*>(p.lse_s)[offset + position] = static_cast<T>(-__builtin_inf());
      static_cast<T*>(p.lse_t)[offset + position] = static_cast<T>(-__builtin_inf());
    }
  }
}

// Gradients of all keys, from queries that carried the scale in units of log 2.
template <class T>
inline void store_key_grads(const Divergence& p, const HeadTask& task, const T* dk) {
  const int64_t width = round_up(p.head_dim_s, kLanes<T>);
  const Heads& to = p.self ? p.dq : p.dk;
  for (int64_t i = 0; i < task.sequence->count; ++i) {
    store_head_row(dk + i * width, static_cast<T>(kLn2), to, *task.sequence, task.head, i, p.head_dim_s);
  }
}

// What becomes of the sums of `queries` rows from `first` on: loss and lse.
template <class T>
inline void store_rows(const Divergence& p, const HeadTask& task, int64_t offset, int64_t first,
                       int64_t queries, const ModelRows<T>& row) {
  for (int64_t i = 0; i < queries; ++i) {
    const int64_t at = offset + task.sequence->position[first + i];
    if (p.rows != nullptr) static_cast<T*>(p.rows)[at] = divergence(row, i);
    if (p.lse_s != nullptr) {
      static_cast<T*>(p.lse_s)[at] = static_cast<T>(kLn2 * row.top_s[i] + __builtin_log(row.sum_s[i]));
      static_cast<T*>(p.lse_t)[at] = static_cast<T>(kLn2 * row.top_t[i] + __builtin_log(row.sum_t[i]));
    }
  }
}

template <class T>
inline void set_grad_rows(const Divergence& p, const HeadTask& task, int64_t first, int64_t queries,
                          const ModelRows<T>& row, const GradRows<T>& grad) {
  fill(grad.near, 3 * kQueryBlock, T(0));
  for (int64_t i = 0; i < queries; ++i) {
    T upstream = 1;
    if (p.grad_rows.data != nullptr) {
      load_as(p.grad_rows.dtype, p.grad_rows.data,
              row_offset(p.grad_rows, *task.sequence, task.head, first + i), 1, 1, 1, T(1), &upstream);
    }
    set_grad_row(row, i, upstream, grad);
  }
}

template <class T>
void divergence_task(const Divergence& p, const HeadTask& task, void* memory) {
  const Sequence& sequence = *task.sequence;
  const int64_t head = task.head, count = sequence.count, rows = round_up(count, kPadding);
  const int64_t width_s = round_up(p.head_dim_s, kLanes<T>), width_t = round_up(p.head_dim_t, kLanes<T>);
  const int64_t offset = (sequence.batch * p.heads + head) * p.length + sequence.begin;
  const bool with_grads = p.dq.data != nullptr, known_lse = p.known_lse_s != nullptr;
  if (task.first == 0 && !sequence.dense) clear_unreal_rows<T>(p, sequence, head, offset);

  Scratch<T> scratch{static_cast<T*>(memory)};
  T* few_rows = scratch.take(kPadding * max_of(width_s, width_t));
  T* panels_s = scratch.take(rows * width_s);
  T* panels_t = scratch.take(rows * width_t);
  T* k_rows = scratch.take(rows * width_s);  // (keys, width_s), as is dk
  T* dk = task.sums != nullptr ? static_cast<T*>(task.sums) : scratch.take(rows * width_s);
  T* student_rows = scratch.take(kQueryBlock * width_s);
  T* teacher_rows = scratch.take(kQueryBlock * width_t);
  T* q_s = scratch.take(kQueryBlock * width_s);  // (width_s, queries), as is dq
  T* q_t = scratch.take(kQueryBlock * width_t);
  T* dq = scratch.take(kQueryBlock * width_s);
  T* scores_s = scratch.take(rows * kQueryBlock);  // (keys, queries)
  T* scores_t = scratch.take(rows * kQueryBlock);
  T* tops = scratch.take(2 * kQueryBlock);
  T* sums = scratch.take(4 * kQueryBlock);
  T* grad_rows = scratch.take(3 * kQueryBlock);
  const ModelRows<T> row{
      tops, tops + kQueryBlock, sums, sums + kQueryBlock, sums + 2 * kQueryBlock, sums + 3 * kQueryBlock};
  const GradRows<T> grad{grad_rows, grad_rows + kQueryBlock, grad_rows + 2 * kQueryBlock};

  load_panels(p.k_s, sequence, head, p.head_dim_s, width_s, few_rows, panels_s);
  load_panels(p.k_t, sequence, head, p.head_dim_t, width_t, few_rows, panels_t);
  if (with_grads) {
    load_rows(p.k_s, sequence, head, 0, count, p.head_dim_s, width_s, T(1), k_rows);
    fill(dk, rows * width_s, T(0));
  }
  // scores in units of log 2, as exponentials are powers of 2
  const T scale_s = static_cast<T>(p.scale_s * kLog2E), scale_t = static_cast<T>(p.scale_t * kLog2E);
  for (int64_t first = task.first; first < task.last; first += kQueryBlock) {
    const int64_t queries = min_of(kQueryBlock, task.last - first), last = first + queries;
    const int64_t columns = round_up(queries, kLanes<T>);
    load_rows(p.q_s, sequence, head, first, last, p.head_dim_s, width_s, scale_s, student_rows);
    load_rows(p.q_t, sequence, head, first, last, p.head_dim_t, width_t, scale_t, teacher_rows);
    to_lanes(student_rows, queries, width_s, q_s);
    to_lanes(teacher_rows, queries, width_t, q_t);
    fill(tops, 2 * kQueryBlock, known_lse ? T(0) : static_cast<T>(-__builtin_inf()));
    fill(sums, 4 * kQueryBlock, T(0));
    for (int64_t i = 0; known_lse && i < queries; ++i) {
      const int64_t at = offset + sequence.position[first + i];
      row.top_s[i] = static_cast<const T*>(p.known_lse_s)[at] * static_cast<T>(kLog2E);
      row.top_t[i] = static_cast<const T*>(p.known_lse_t)[at] * static_cast<T>(kLog2E);
    }
    for (int64_t key = 0; key < count; key += kKeyBlock) {
      const int64_t end = min_of(key + kKeyBlock, count), at = key * kQueryBlock;
      scores_tile(panels_s, key, end, p.head_dim_s, width_s, q_s, columns, scores_s + at);
      scores_tile(panels_t, key, end, p.head_dim_t, width_t, q_t, columns, scores_t + at);
      if (known_lse) {
        exponentials(end - key, columns, scores_s + at, scores_t + at, row);
      } else {
        raise_tops(end - key, columns, scores_s + at, row.top_s);
        raise_tops(end - key, columns, scores_t + at, row.top_t);
      }
    }
    for (int64_t key = 0; !known_lse && key < count; key += kKeyBlock) {
      const int64_t end = min_of(key + kKeyBlock, count), at = key * kQueryBlock;
      exponentials(end - key, columns, scores_s + at, scores_t + at, row);
    }
    store_rows(p, task, offset, first, queries, row);
    if (!with_grads) continue;

    set_grad_rows(p, task, first, queries, row, grad);
    fill(dq, width_s * kQueryBlock, T(0));
    for (int64_t key = 0; key < count; key += kKeyBlock) {
      const int64_t end = min_of(key + kKeyBlock, count), at = key * kQueryBlock;
      score_grads(end - key, columns, scores_s + at, scores_t + at, grad);
      add_to_rows(scores_s + at, end - key, queries, student_rows, width_s, dk + key * width_s);
      add_to_lanes(k_rows + key * width_s, end - key, width_s, scores_s + at, columns, dq);
    }
    T* dq_rows = student_rows;
    transpose(dq, kQueryBlock, width_s, columns, dq_rows, width_s);
    for (int64_t i = 0; i < queries; ++i) {
      const T* from = dq_rows + i * width_s;
      if (p.self) {
        T* both = dk + (first + i) * width_s;
        for (int64_t d = 0; d < width_s; ++d) both[d] += from[d] * scale_s;
      } else {
        store_head_row(from, static_cast<T>(p.scale_s), p.dq, sequence, head, first + i, p.head_dim_s);
      }
    }
  }
  if (with_grads && task.sums == nullptr) store_key_grads(p, task, dk);
}

// The keys' gradients from the sums of a head's tasks, always in the same order.
template <class T>
void divergence_reduce(const Divergence& p, const HeadTask* tasks, int64_t count) {
  const int64_t rows = round_up(tasks->sequence->count, kPadding), width = round_up(p.head_dim_s, kLanes<T>);
  store_key_grads(p, *tasks, add_parts<T>(tasks, count, rows * width));
}

}  // namespace bertops::BERTOPS_ISA
