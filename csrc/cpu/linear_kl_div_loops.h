// KL between two models' predictions of a vocabulary for a chunk of tokens. Included once per instruction set.
namespace bertops::BERTOPS_ISA {

template <class T>
inline GradRows<T> factors_of(const LinearKL& p, const Chunk& chunk) {
  const int64_t tokens = chunk.blocks * kQueryBlock;
  T* near = static_cast<T*>(p.factors);
  return {near, near + tokens, near + 2 * tokens};
}

template <class T>
void vocabulary_pack(const LinearKL& p, const Chunk& chunk, int64_t block, void* scratch) {
  T* rows = static_cast<T*>(scratch);
  pack_columns(p.student, chunk, block, rows, static_cast<T*>(p.columns_s));
  pack_columns(p.teacher, chunk, block, rows, static_cast<T*>(p.columns_t));
  if (p.grads.weight != nullptr) pack_rows(p.student, chunk, block, rows, static_cast<T*>(p.rows_s));
}

// Logits of kOutputBlock words and their largest, for the tokens of blocks [from, to) and one model.
template <class T>
inline void model_logits(const LinearKL& p, const Linear& model, const Chunk& chunk, int64_t task,
                         int64_t from, int64_t to, const T* columns, T* logits, T* tops, T* scratch) {
  const int64_t first = task * kOutputBlock, words = min_of(kOutputBlock, model.outputs - first);
  const T scale = static_cast<T>(kLog2E / p.temperature);
  T* bias = scratch;
  if (model.bias.data == nullptr) {
    fill(bias, words, T(0));
  } else {
    load_as(model.bias.dtype, model.bias.data, first * model.bias.row_stride, model.bias.row_stride, words,
            words, scale, bias);
  }
  multiply_outputs<T>(model, chunk, first, from, to, columns, logits, scratch + kOutputBlock,
                      [&](int64_t block, int64_t column, T* tile) {
                        for (int64_t i = 0; i < kPanel<T>; i += kLanes<T>) {
                          Vec<T> top = broadcast(static_cast<T>(-__builtin_inf()));
                          for (int64_t word = 0; word < words; ++word) {
                            T* at = tile + word * kQueryBlock + i;
                            const Vec<T> z = load(at) * scale + bias[word];
                            top = max<T>(top, z);
                            store(at, z);
                          }
                          store(tops + block * kQueryBlock + column + i, top);
                        }
                      });
}

template <class T>
void vocabulary_logits(const LinearKL& p, const Chunk& chunk, int64_t task, int64_t from, int64_t to,
                       void* memory) {
  const int64_t tokens = chunk.blocks * kQueryBlock;
  T* tops = static_cast<T*>(p.tops) + 2 * task * tokens;
  T* scratch = static_cast<T*>(memory);
  model_logits(p, p.student, chunk, task, from, to, static_cast<const T*>(p.columns_s),
               static_cast<T*>(p.logits_s), tops, scratch);
  model_logits(p, p.teacher, chunk, task, from, to, static_cast<const T*>(p.columns_t),
               static_cast<T*>(p.logits_t), tops + tokens, scratch);
}

// Logits of the tokens [column, column + columns) of a block become exponentials, whose sums give the loss and what
// turns exponentials into gradients.
template <class T>
void vocabulary_softmax(const LinearKL& p, const Chunk& chunk, int64_t block, int64_t column, int64_t columns,
                        void* memory) {
  T* scratch = static_cast<T*>(memory);
  T* sums = scratch + 2 * kQueryBlock;
  const ModelRows<T> row{scratch,
                         scratch + kQueryBlock,
                         sums,
                         sums + kQueryBlock,
                         sums + 2 * kQueryBlock,
                         sums + 3 * kQueryBlock};
  const int64_t words = p.student.outputs, tokens = chunk.blocks * kQueryBlock;
  const int64_t first = block * kQueryBlock + column, real = min_of(columns, chunk.count - first);
  fill(scratch, 2 * kQueryBlock, static_cast<T>(-__builtin_inf()));
  fill(sums, 4 * kQueryBlock, T(0));
  for (int64_t task = 0; task * kOutputBlock < words; ++task) {
    const T* tops = static_cast<const T*>(p.tops) + 2 * task * tokens + first;
    for (int64_t i = 0; i < round_up(real, kLanes<T>); i += kLanes<T>) {
      store(row.top_s + i, max<T>(load(row.top_s + i), load(tops + i)));
      store(row.top_t + i, max<T>(load(row.top_t + i), load(tops + tokens + i)));
    }
  }
  const int64_t offset = block * padded(words) * kQueryBlock + column;
  T* logits_s = static_cast<T*>(p.logits_s) + offset;
  T* logits_t = static_cast<T*>(p.logits_t) + offset;
  for (int64_t word = 0; word < words; word += kKeyBlock) {
    const int64_t at = word * kQueryBlock;
    exponentials(min_of(kKeyBlock, words - word), round_up(real, kLanes<T>), logits_s + at, logits_t + at,
                 row);
  }
  const GradRows<T> factors = factors_of<T>(p, chunk);
  const GradRows<T> grad{factors.near + first, factors.far + first, factors.factor + first};
  for (int64_t i = 0; i < columns; ++i) {
    if (i >= real) {
      grad.near[i] = grad.far[i] = grad.factor[i] = 0;
      continue;
    }
    const int64_t token = chunk.token[first + i];
    const T kl = divergence(row, i), square = static_cast<T>(p.temperature * p.temperature);
    static_cast<T*>(p.rows)[token] = kl < 0 ? T(0) : kl * square;  // below 0 by rounding alone
    if (p.grad_rows.data == nullptr) continue;
    T upstream = 0;
    load_as(p.grad_rows.dtype, p.grad_rows.data, token * p.grad_rows.row_stride, 1, 1, 1,
            static_cast<T>(p.temperature), &upstream);
    set_grad_row(row, i, upstream, grad);
  }
}

// The gradients of a chunk's logits, from their exponentials.
template <class T>
struct LogitGrads {
  const T *exp_s, *exp_t;
  int64_t words;  // padded
  GradRows<T> rows;

  struct Lanes {
    const T *exp_s, *exp_t;
    Vec<T> near, far, factor;
    BERTOPS_INLINE Vec<T> at(int64_t word) const {
      return score_grad<T>(load(exp_s + word * kQueryBlock), load(exp_t + word * kQueryBlock), near, far,
                           factor);
    }
  };

  BERTOPS_INLINE Lanes lanes(int64_t block, int64_t column) const {
    const int64_t offset = block * words * kQueryBlock + column, token = block * kQueryBlock + column;
    return {exp_s + offset, exp_t + offset, load(rows.near + token), load(rows.far + token),
            load(rows.factor + token)};
  }
};

template <class T>
inline LogitGrads<T> logit_grads(const LinearKL& p, const Chunk& chunk) {
  return {static_cast<const T*>(p.logits_s), static_cast<const T*>(p.logits_t), padded(p.student.outputs),
          factors_of<T>(p, chunk)};
}

template <class T>
void vocabulary_weight_grads(const LinearKL& p, const Chunk& chunk, int64_t task, void* scratch) {
  add_weight_grads<T>(p.student, chunk, task * kOutputBlock, logit_grads<T>(p, chunk),
                      static_cast<const T*>(p.rows_s), p.grads, static_cast<T*>(scratch));
}

template <class T>
void vocabulary_hidden_grads(const LinearKL& p, const Chunk& chunk, int64_t from, int64_t to, int64_t first,
                             int64_t last, void* scratch) {
  store_hidden_grads<T>(p.student, chunk, from, to, first, last, logit_grads<T>(p, chunk),
                        static_cast<T*>(p.sums), static_cast<T*>(p.grads.hidden), static_cast<T*>(scratch));
}

}  // namespace bertops::BERTOPS_ISA
