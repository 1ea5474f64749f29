// TinyBERT's attention loss over one head, in two forms; what P and R are says attention_score_mse.h. Included once
// per instruction set.
namespace bertops::BERTOPS_ISA {

// Rows [first, last) of student and teacher side by side into `to` (rows, width).
template <class T>
inline void load_both(const ScoreMSE& p, const Heads& of_s, const Heads& of_t, const HeadTask& task,
                      int64_t first, int64_t last, int64_t width, T scale_s, T scale_t, T* to) {
  const int64_t dim_s = p.head_dim_s, dim_t = p.head_dim_t;
  for (int64_t i = first; i < last; ++i, to += width) {
    const int64_t at_s = row_offset(of_s, *task.sequence, task.head, i);
    const int64_t at_t = row_offset(of_t, *task.sequence, task.head, i);
    load_as(of_s.dtype, of_s.data, at_s, of_s.dim_stride, dim_s, dim_s, scale_s, to);
    load_as(of_t.dtype, of_t.data, at_t, of_t.dim_stride, dim_t, width - dim_s, scale_t, to + dim_s);
  }
}

// (rows, width) of student and teacher become their difference and their mean, or their mean and their difference.
template <bool kDifferenceFirst, class T>
inline void differences_and_means(int64_t rows, int64_t dim, int64_t width, T* both) {
  for (int64_t i = 0; i < rows; ++i, both += width) {
    T *of_s = both, *of_t = both + dim;
#pragma GCC ivdep
    for (int64_t d = 0; d < dim; ++d) {
      const T difference = of_s[d] - of_t[d], mean = (of_s[d] + of_t[d]) * T(0.5);
      of_s[d] = kDifferenceFirst ? difference : mean;
      of_t[d] = kDifferenceFirst ? mean : difference;
    }
  }
}

// Rows [first, last) of P into `to` (rows, width) and, where asked for, of scale_s Q_s into `student` (rows, width_s).
template <class T>
inline void load_p(const ScoreMSE& p, const HeadTask& task, int64_t first, int64_t last, int64_t width, T* to,
                   int64_t width_s = 0, T* student = nullptr) {
  const T scale_t = static_cast<T>(same_head_dim(p) ? p.scale_t : -p.scale_t);
  load_both(p, p.q_s, p.q_t, task, first, last, width, static_cast<T>(p.scale_s), scale_t, to);
  for (int64_t i = 0; student != nullptr && i < last - first; ++i) {
    for (int64_t d = 0; d < width_s; ++d)
      student[i * width_s + d] = d < p.head_dim_s ? to[i * width + d] : T(0);
  }
  if (same_head_dim(p)) differences_and_means<true>(last - first, p.head_dim_s, width, to);
}

// Rows [first, last) of R into `to` (rows, width).
template <class T>
inline void load_r(const ScoreMSE& p, const HeadTask& task, int64_t first, int64_t last, int64_t width,
                   T* to) {
  load_both(p, p.k_s, p.k_t, task, first, last, width, T(1), T(1), to);
  if (same_head_dim(p)) differences_and_means<false>(last - first, p.head_dim_s, width, to);
}

// Adds the squares of (keys, queries) to the sums of the queries.
template <class T>
inline void add_squares(int64_t keys, int64_t columns, const T* differences, T* sums) {
  for (int64_t column = 0; column < columns; column += kLanes<T>) {
    Vec<T> sum{};
    for (int64_t key = 0; key < keys; ++key) {
      const Vec<T> x = load(differences + key * kQueryBlock + column);
      sum += x * x;
    }
    store(sums + column, load(sums + column) + sum);
  }
}

template <class T>
inline void scale_columns(int64_t keys, int64_t columns, const T* factor, T* tile) {
  for (int64_t column = 0; column < columns; column += kLanes<T>) {
    const Vec<T> f = load(factor + column);
    for (int64_t key = 0; key < keys; ++key) {
      T* x = tile + key * kQueryBlock + column;
      store(x, load(x) * f);
    }
  }
}

// The factor of all rows: d (A - B)^2 = 2 (A - B), times the gradient of a row where there is one.
template <class T>
inline void store_key_grads(const ScoreMSE& p, const HeadTask& task, const T* dk) {
  const int64_t width_s = round_up(p.head_dim_s, kLanes<T>);
  for (int64_t i = 0; i < task.sequence->count; ++i) {
    store_head_row(dk + i * width_s, T(2), p.dk, *task.sequence, task.head, i, p.head_dim_s);
  }
}

template <class T>
inline void clear_unreal_grads(const ScoreMSE& p, const HeadTask& task) {
  clear_unreal(p.dq, *task.sequence, task.head, p.head_dim_s);
  clear_unreal(p.dk, *task.sequence, task.head, p.head_dim_s);
}

// Direct form: every tile of A - B, its squares or its products with the student's rows.
template <class T>
void direct_task(const ScoreMSE& p, const HeadTask& task, void* memory) {
  const Sequence& sequence = *task.sequence;
  const int64_t head = task.head, count = sequence.count, rows = round_up(count, kPadding);
  const int64_t width = round_up(pair_dim(p), kLanes<T>), width_s = round_up(p.head_dim_s, kLanes<T>);
  const bool with_rows = p.rows != nullptr, with_grads = p.dq.data != nullptr;
  const int64_t offset = (sequence.batch * p.heads + head) * p.length + sequence.begin;
  T* sums = with_rows ? static_cast<T*>(p.rows) + offset : nullptr;
  if (task.first == 0 && !sequence.dense) {
    if (with_grads) clear_unreal_grads<T>(p, task);
    int64_t next = 0, position = -1;
    while (with_rows && (position = next_unreal(sequence, position + 1, next)) < sequence.length) {
      sums[position] = 0;
    }
  }

  Scratch<T> scratch{static_cast<T*>(memory)};
  T* few_rows = scratch.take(kPadding * width);
  T* r = scratch.take(rows * width);         // panels
  T* k_rows = scratch.take(rows * width_s);  // (keys, width_s), as is dk
  T* dk = task.sums != nullptr ? static_cast<T*>(task.sums) : scratch.take(rows * width_s);
  T* p_rows = scratch.take(kQueryBlock * width);
  T* lanes = scratch.take(kQueryBlock * width);  // (width, queries)
  T* q_rows = scratch.take(kQueryBlock * width_s);
  T* dq = scratch.take(kQueryBlock * width_s);  // (width_s, queries)
  T* tile = scratch.take(kKeyBlock * kQueryBlock);
  T* rows_of_block = scratch.take(2 * kQueryBlock);
  T *row_sums = rows_of_block, *row_grads = rows_of_block + kQueryBlock;

  fill_panels(count, width, few_rows, r,
              [&](int64_t i, int64_t end, T* to) { load_r(p, task, i, end, width, to); });
  if (with_grads) {
    load_rows(p.k_s, sequence, head, 0, count, p.head_dim_s, width_s, T(1), k_rows);
    fill(dk, rows * width_s, T(0));
  }
  for (int64_t first = task.first; first < task.last; first += kQueryBlock) {
    const int64_t queries = min_of(kQueryBlock, task.last - first), columns = round_up(queries, kLanes<T>);
    load_p(p, task, first, first + queries, width, p_rows, width_s, q_rows);
    to_lanes(p_rows, queries, width, lanes);
    fill(rows_of_block, 2 * kQueryBlock, T(0));
    fill(dq, width_s * kQueryBlock, T(0));
    for (int64_t i = 0; p.grad_rows.data != nullptr && i < queries; ++i) {
      const int64_t at = row_offset(p.grad_rows, sequence, head, first + i);
      load_as(p.grad_rows.dtype, p.grad_rows.data, at, 1, 1, 1, T(1), row_grads + i);
    }
    for (int64_t key = 0; key < count; key += kKeyBlock) {
      const int64_t end = min_of(key + kKeyBlock, count), keys = end - key;
      scores_tile(r, key, end, pair_dim(p), width, lanes, columns, tile);
      if (with_rows) add_squares(keys, columns, tile, row_sums);
      if (!with_grads) continue;
      if (p.grad_rows.data != nullptr) scale_columns(keys, columns, row_grads, tile);
      add_to_rows(tile, keys, queries, q_rows, width_s, dk + key * width_s);
      add_to_lanes(k_rows + key * width_s, keys, width_s, tile, columns, dq);
    }
    transpose(dq, kQueryBlock, width_s, columns, q_rows, width_s);
    for (int64_t i = 0; i < queries; ++i) {
      if (with_rows) sums[sequence.position[first + i]] = row_sums[i];
      if (with_grads) {
        store_head_row(q_rows + i * width_s, static_cast<T>(2 * p.scale_s), p.dq, sequence, head, first + i,
                       p.head_dim_s);
      }
    }
  }
  if (with_grads && task.sums == nullptr) store_key_grads(p, task, dk);
}

template <class T>
void direct_reduce(const ScoreMSE& p, const HeadTask* tasks, int64_t count) {
  const int64_t rows = round_up(tasks->sequence->count, kPadding),
                width_s = round_up(p.head_dim_s, kLanes<T>);
  store_key_grads(p, *tasks, add_parts<T>(tasks, count, rows * width_s));
}

// G (width, width) += X^T X on and above the diagonal, and wherever the diagonal's vectors reach below it.
template <class T>
inline void add_gram(const T* x, int64_t rows, int64_t width, T* gram) {
  for (int64_t d = 0; d < width; d += kTileRows<T>) {
    const int64_t from = d / kLanes<T> * kLanes<T>;
    tile_row<1, true>(width - from, rows, x + d, width, x + from, width, gram + d * width + from, width);
  }
}

// The half below the diagonal.
template <class T>
inline void mirror(int64_t width, T* gram) {
  constexpr int64_t L = kLanes<T>;
  for (int64_t i = L; i < width; i += L) {
    for (int64_t j = 0; j < i; j += L)
      transpose(gram + j * width + i, width, L, L, gram + i * width + j, width);
  }
}

// Where the loss of a head, and its Grams in p.grams, have their place.
inline int64_t place_of(const ScoreMSE& p, const HeadTask& task) {
  return task.sequence->identity * p.heads + task.head;
}
template <class T>
inline T* grams_of(const ScoreMSE& p, const HeadTask& task) {
  return static_cast<T*>(p.grams) + place_of(p, task) * 2 * pair_dim(p) * pair_dim(p);
}

// The loss of a head and its Grams `to` (2, dim, dim) from P^T P and R^T R, which follow each other, on and above
// their diagonals.
template <class T>
inline void store_grams(const ScoreMSE& p, const HeadTask& task, T* grams, T* to) {
  constexpr int64_t kSums = kLanes<T>;
  const int64_t dim = pair_dim(p), width = round_up(dim, kLanes<T>);
  mirror(width, grams);
  mirror(width, grams + width * width);
  double sums[kSums] = {};
  for (int64_t i = 0; i < dim; ++i) {
    const T *of_p = grams + i * width, *of_r = of_p + width * width;
    __builtin_memcpy(to + i * dim, of_p, dim * sizeof(T));
    __builtin_memcpy(to + (dim + i) * dim, of_r, dim * sizeof(T));
    for (int64_t j = 0; j < width; j += kSums) {  // 0 beyond dim
      for (int64_t n = 0; n < kSums; ++n) sums[n] += static_cast<double>(of_p[j + n]) * of_r[j + n];
    }
  }
  double total = 0;
  for (int64_t n = 0; n < kSums; ++n) total += sums[n];
  static_cast<T*>(p.sums)[place_of(p, task)] = static_cast<T>(total);
}

// P^T P and R^T R of the task's rows, on and above their diagonals.
template <class T>
inline void sum_grams(const ScoreMSE& p, const HeadTask& task, Scratch<T> scratch, T* grams) {
  const int64_t width = round_up(pair_dim(p), kLanes<T>);
  T* p_rows = scratch.take(kGramBlock * width);
  T* r_rows = scratch.take(kGramBlock * width);
  T* part = task.last - task.first > kGramPart ? scratch.take(2 * width * width) : grams;
  fill(grams, 2 * width * width, T(0));
  for (int64_t begin = task.first; begin < task.last; begin += kGramPart) {
    if (part != grams) fill(part, 2 * width * width, T(0));
    const int64_t end = min_of(begin + kGramPart, task.last);
    for (int64_t first = begin; first < end; first += kGramBlock) {
      const int64_t rows = min_of(kGramBlock, end - first);
      load_p(p, task, first, first + rows, width, p_rows);
      load_r(p, task, first, first + rows, width, r_rows);
      add_gram(p_rows, rows, width, part);
      add_gram(r_rows, rows, width, part + width * width);
    }
    for (int64_t i = 0; part != grams && i < 2 * width * width; ++i) grams[i] += part[i];
  }
}

template <class T>
void gram_task(const ScoreMSE& p, const HeadTask& task, void* memory) {
  const int64_t width = round_up(pair_dim(p), kLanes<T>);
  Scratch<T> scratch{static_cast<T*>(memory)};
  T* grams = task.sums != nullptr ? static_cast<T*>(task.sums) : scratch.take(2 * width * width);
  sum_grams(p, task, scratch, grams);
  if (task.sums == nullptr) store_grams(p, task, grams, grams_of<T>(p, task));
}

template <class T>
void gram_reduce(const ScoreMSE& p, const HeadTask* tasks, int64_t count) {
  const int64_t width = round_up(pair_dim(p), kLanes<T>);
  store_grams(p, *tasks, add_parts<T>(tasks, count, 2 * width * width), grams_of<T>(p, *tasks));
}

// dQ_s = 2 g scale_s P (R^T K_s) and dK_s = 2 g R (P^T scale_s Q_s) with g = `grad`: the student's columns of `grams`
// (2, dim, dim), or the mean's and half of the difference's.
template <class T>
inline void gram_grads(const ScoreMSE& p, const HeadTask& task, const T* grams, double grad,
                       Scratch<T> scratch) {
  constexpr int64_t L = kLanes<T>;
  const Sequence& sequence = *task.sequence;
  const int64_t dim = pair_dim(p), dim_s = p.head_dim_s;
  const int64_t width = round_up(dim, L), width_s = round_up(dim_s, L);
  if (task.first == 0 && !sequence.dense) clear_unreal_grads<T>(p, task);

  T* for_q = scratch.take(width * width_s);  // (width, width_s)
  T* for_k = scratch.take(width * width_s);
  T* rows = scratch.take(kPadding * width);
  T* panel = scratch.take(kPadding * width);  // (width, L)
  T* grads = scratch.take(kPadding * width_s);
  fill(for_q, 2 * width * width_s, T(0));
  for (int64_t i = 0; i < dim; ++i) {
    const T *of_p = grams + i * dim, *of_r = of_p + dim * dim;
    for (int64_t d = 0; d < dim_s; ++d) {
      for_q[i * width_s + d] = same_head_dim(p) ? of_r[d] + T(0.5) * of_r[dim_s + d] : of_r[d];
      for_k[i * width_s + d] = same_head_dim(p) ? T(0.5) * of_p[d] + of_p[dim_s + d] : of_p[d];
    }
  }
  // one matrix at a time: both do not fit into the first cache
  const auto multiply = [&](const T* matrix, T scale, const Heads& to, const auto& load) {
    for (int64_t first = task.first; first < task.last; first += L) {
      const int64_t count = min_of(L, task.last - first);
      fill_panels(count, width, rows, panel,
                  [&](int64_t i, int64_t end, T* to) { load(first + i, first + end, to); });
      fill(grads, L * width_s, T(0));
      for (int64_t k = 0; k < dim; k += kGramBlock) {
        for (int64_t i = 0; i < L; i += kTileRows<T>) {
          tile_row<1, true>(width_s, min_of(kGramBlock, dim - k), panel + k * L + i, L, matrix + k * width_s,
                            width_s, grads + i * width_s, width_s);
        }
      }
      for (int64_t i = 0; i < count; ++i) {
        store_head_row(grads + i * width_s, scale, to, sequence, task.head, first + i, dim_s);
      }
    }
  };
  multiply(for_q, static_cast<T>(2 * grad * p.scale_s), p.dq,
           [&](int64_t i, int64_t end, T* rows) { load_p(p, task, i, end, width, rows); });
  multiply(for_k, static_cast<T>(2 * grad), p.dk,
           [&](int64_t i, int64_t end, T* rows) { load_r(p, task, i, end, width, rows); });
}

template <class T>
void gram_grad_task(const ScoreMSE& p, const HeadTask& task, void* memory) {
  gram_grads(p, task, grams_of<T>(p, task), *static_cast<const T*>(p.grad),
             Scratch<T>{static_cast<T*>(memory)});
}

// A whole head: its loss and the gradients of that. The Grams never leave the cache, and the rows are in it when the
// gradients read them again. Sums join in the order of gram_task and gram_reduce.
template <class T>
void gram_with_grads_task(const ScoreMSE& p, const HeadTask& task, void* memory) {
  const int64_t dim = pair_dim(p), width = round_up(dim, kLanes<T>), elements = 2 * width * width;
  Scratch<T> scratch{static_cast<T*>(memory)};
  T* grams = scratch.take(elements);
  T* piece_grams = scratch.take(elements);
  T* dense = scratch.take(2 * dim * dim);
  fill(grams, elements, T(0));
  HeadTask piece = task;
  for (; piece.first < task.last; piece.first = piece.last) {
    piece.last = min_of(piece.first + kRowsPerGramTask, task.last);
    sum_grams(p, piece, scratch, piece_grams);
    for (int64_t i = 0; i < elements; ++i) grams[i] += piece_grams[i];
  }
  store_grams(p, task, grams, dense);
  gram_grads(p, task, dense, 1.0, scratch);
}

}  // namespace bertops::BERTOPS_ISA
