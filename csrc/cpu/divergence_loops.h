// KL between the attention of two models over one head, with its gradient where one is wanted. The scores of a block
// of queries against all keys, of both models, stay in scratch: (N, kQueryBlock) each, linear in N. A softmax then
// sees its maximum before its first exponential, and no score is computed twice. Included once per instruction set.
namespace bertops::BERTOPS_ISA {

// One number for every query of a block.
template <class T>
struct ModelRows {
  T *top_s, *top_t;  // maximum of S and T so far, in units of log 2
  T *sum_s, *sum_t;  // of exp(S - top_s) and exp(T - top_t)
  T* excess;         // sum of exp(S - top_s) - exp(T - top_t)
  T* drift;          // sum of exp(T - top_t) ((S - top_s) - (T - top_t)) / ln 2
};

template <class T>
inline void raise_tops(int64_t keys, int64_t columns, const T* scores, T* top) {
  for (int64_t column = 0; column < columns; column += kLanes<T>) {
    Vec<T> now = load(top + column);
    for (int64_t key = 0; key < keys; ++key) now = max<T>(now, load(scores + key * kQueryBlock + column));
    store(top + column, now);
  }
}

// S and T (keys, queries) become exp(S - top_s) and exp(T - top_t), and join the sums of their rows. Only the larger
// of the two is an exponential of its own, the other is its multiple by exp(-|v|): where both models agree they
// agree in every bit, and `excess` keeps the digits that the difference of two exponentials would lose.
template <class T>
inline void exponentials(int64_t keys, int64_t columns, T* scores_s, T* scores_t, const ModelRows<T>& rows) {
  for (int64_t column = 0; column < columns; column += kLanes<T>) {
    const Vec<T> top_s = load(rows.top_s + column), top_t = load(rows.top_t + column);
    Vec<T> sum_s{}, sum_t{}, excess{}, drift{};
    for (int64_t key = 0; key < keys; ++key) {
      const int64_t at = key * kQueryBlock + column;
      const Vec<T> s = load(scores_s + at) - top_s, t = load(scores_t + at) - top_t;
      const Vec<T> v = s - t;
      const auto student_larger = v > T(0);
      const Vec<T> larger = exp2(student_larger ? s : t);
      const Exp2<T> ratio = exp2_and_less_one(student_larger ? -v : v);
      const Vec<T> smaller = larger * ratio.value, difference = larger * ratio.less_one;
      const Vec<T> exp_s = student_larger ? larger : smaller, exp_t = student_larger ? smaller : larger;
      sum_s += exp_s;
      sum_t += exp_t;
      excess += student_larger ? -difference : difference;
      drift += exp_t * v;
      store(scores_s + at, exp_s);
      store(scores_t + at, exp_t);
    }
    store(rows.sum_s + column, load(rows.sum_s + column) + sum_s);
    store(rows.sum_t + column, load(rows.sum_t + column) + sum_t);
    store(rows.excess + column, load(rows.excess + column) + excess);
    store(rows.drift + column, load(rows.drift + column) + drift);
  }
}

// KL = ln(E_t[exp v]) - E_t[v], E_t the mean over the teacher's probabilities: no lse is subtracted from another.
template <class T>
inline T divergence(const ModelRows<T>& rows, int64_t i) {
  const T sum_t = rows.sum_t[i], excess = rows.excess[i] / sum_t;
  const bool close = excess > T(-0.5) && excess < T(0.5);
  const double log_mean = close ? __builtin_log1p(excess) : __builtin_log(rows.sum_s[i] / sum_t);
  return static_cast<T>(log_mean - kLn2 * (rows.drift[i] / sum_t));
}

// What turns the exponentials of a row into dS = factor (near exp(S) - exp(T) + far exp(S)). With near 1 and far
// the small rest of sum_t / sum_s where the sums are close, no digits are lost where the probabilities are.
template <class T>
struct GradRows {
  T *near, *far, *factor;
};

// dS into S: 0 where both models agree in every bit, whatever the compiler fuses.
template <class T>
inline void score_grads(int64_t keys, int64_t columns, T* scores_s, const T* scores_t,
                        const GradRows<T>& rows) {
  for (int64_t column = 0; column < columns; column += kLanes<T>) {
    const Vec<T> near = load(rows.near + column), far = load(rows.far + column);
    const Vec<T> factor = load(rows.factor + column);
    for (int64_t key = 0; key < keys; ++key) {
      const int64_t at = key * kQueryBlock + column;
      const Vec<T> exp_s = load(scores_s + at);
      const Vec<T> difference = exp_s * near - load(scores_t + at);
      store(scores_s + at, (exp_s * far + difference) * factor);
    }
  }
}

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
    const T rest = row.excess[i] / row.sum_s[i];
    const bool close = rest > T(-0.5) && rest < T(0.5);
    grad.near[i] = close ? T(1) : row.sum_t[i] / row.sum_s[i];
    grad.far[i] = close ? -rest : T(0);
    grad.factor[i] = upstream / row.sum_t[i];
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
