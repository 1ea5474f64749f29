// Squared error of projected hidden states for a chunk of tokens. Included once per instruction set.
namespace bertops::BERTOPS_ISA {

template <class T>
inline T upstream_of(const ProjectedMSE& p, int64_t token) {
  T upstream = 0;
  load_as(p.grad_rows.dtype, p.grad_rows.data, token * p.grad_rows.row_stride, 1, 1, 1, T(1), &upstream);
  return upstream;
}

template <class T>
void projection_pack(const ProjectedMSE& p, const Chunk& chunk, int64_t block, void* scratch) {
  T* rows = static_cast<T*>(scratch);
  pack_columns(p.student, chunk, block, rows, static_cast<T*>(p.columns));
  if (p.grads.weight != nullptr) pack_rows(p.student, chunk, block, rows, static_cast<T*>(p.token_rows));
}

// `outputs` of the teacher's from `first` on, of `count` tokens: short pieces far apart, which no processor foresees.
inline void prefetch_teacher(const ProjectedMSE& p, const Chunk& chunk, int64_t token, int64_t count,
                             int64_t first, int64_t outputs) {
  constexpr int64_t kLine = 64;
  const int64_t size = bytes_of(p.hidden_t.dtype), end = min_of(token + count, chunk.count);
  for (; token < end; ++token) {
    const char* row = static_cast<const char*>(p.hidden_t.data) +
                      (chunk.token[token] * p.hidden_t.row_stride + first * p.hidden_t.stride) * size;
    for (int64_t byte = 0; byte < outputs * size; byte += kLine) __builtin_prefetch(row + byte);
  }
}

// Differences to the teacher in kOutputBlock outputs, for the tokens of blocks [from, to).
template <class T>
void projection_differences(const ProjectedMSE& p, const Chunk& chunk, int64_t task, int64_t from, int64_t to,
                            void* memory) {
  constexpr int64_t L = kLanes<T>, P = kPanel<T>;
  const int64_t first = task * kOutputBlock, outputs = min_of(kOutputBlock, p.student.outputs - first);
  const Matrix& given = p.student.bias;
  T* bias = static_cast<T*>(memory);
  T* teacher_rows = bias + kOutputBlock;                     // (kPanel, kOutputBlock)
  T* teacher = teacher_rows + kPanelPadding * kOutputBlock;  // and transposed
  T* packed = teacher + kPanelPadding * kOutputBlock;
  if (given.data == nullptr) {
    fill(bias, outputs, T(0));
  } else {
    load_as(given.dtype, given.data, first * given.row_stride, given.row_stride, outputs, outputs, T(1),
            bias);
  }
  T* squares = static_cast<T*>(p.squares) + task * chunk.blocks * kQueryBlock;
  multiply_outputs<T>(
      p.student, chunk, first, from, to, static_cast<const T*>(p.columns), static_cast<T*>(p.differences),
      packed, [&](int64_t block, int64_t column, T* tile) {
        const int64_t begin = block * kQueryBlock + column;
        for (int64_t i = 0; i < P; ++i) {
          T* row = teacher_rows + i * kOutputBlock;
          if (begin + i < chunk.count) {
            load_as(p.hidden_t.dtype, p.hidden_t.data,
                    chunk.token[begin + i] * p.hidden_t.row_stride + first * p.hidden_t.stride,
                    p.hidden_t.stride, outputs, padded(outputs), T(1), row);
          } else {
            fill(row, padded(outputs), T(0));
          }
        }
        transpose(teacher_rows, kOutputBlock, P, padded(outputs), teacher, P);
        prefetch_teacher(p, chunk, begin + P, P, first, outputs);
        for (int64_t i = 0; i < P; i += L) {
          Vec<T> sum{};
          for (int64_t output = 0; output < outputs;) {
            const int64_t end = min_of(outputs, output + kPadding);
            Vec<T> part{};  // long sums keep their digits
            for (; output < end; ++output) {
              T* at = tile + output * kQueryBlock + i;
              const Vec<T> difference = (load(at) + bias[output]) - load(teacher + output * P + i);
              part += difference * difference;
              store(at, difference);
            }
            sum += part;
          }
          store(squares + begin + i, sum);
        }
      });
}

template <class T>
void projection_rows(const ProjectedMSE& p, const Chunk& chunk, int64_t block) {
  const int64_t tokens = chunk.blocks * kQueryBlock;
  for (int64_t i = block * kQueryBlock; i < (block + 1) * kQueryBlock; ++i) {
    T* factor = static_cast<T*>(p.factors) + i;
    *factor = 0;
    if (i >= chunk.count) continue;
    double sum = 0;
    for (int64_t task = 0; task * kOutputBlock < p.student.outputs; ++task) {
      sum += static_cast<const T*>(p.squares)[task * tokens + i];
    }
    static_cast<T*>(p.rows)[chunk.token[i]] = static_cast<T>(sum);
    if (p.grad_rows.data != nullptr) *factor = 2 * upstream_of<T>(p, chunk.token[i]);
  }
}

// The gradients of a chunk's projections, from their differences.
template <class T>
struct DifferenceGrads {
  const T *differences, *factors;
  int64_t outputs;  // padded

  struct Lanes {
    const T* differences;
    Vec<T> factor;
    BERTOPS_INLINE Vec<T> at(int64_t output) const {
      return load(differences + output * kQueryBlock) * factor;
    }
  };

  BERTOPS_INLINE Lanes lanes(int64_t block, int64_t column) const {
    return {differences + block * outputs * kQueryBlock + column,
            load(factors + block * kQueryBlock + column)};
  }
};

template <class T>
inline DifferenceGrads<T> difference_grads(const ProjectedMSE& p) {
  return {static_cast<const T*>(p.differences), static_cast<const T*>(p.factors), padded(p.student.outputs)};
}

template <class T>
void projection_weight_grads(const ProjectedMSE& p, const Chunk& chunk, int64_t task, void* scratch) {
  add_weight_grads<T>(p.student, chunk, task * kOutputBlock, difference_grads<T>(p),
                      static_cast<const T*>(p.token_rows), p.grads, static_cast<T*>(scratch));
}

template <class T>
void projection_hidden_grads(const ProjectedMSE& p, const Chunk& chunk, int64_t from, int64_t to,
                             int64_t first, int64_t last, void* scratch) {
  store_hidden_grads<T>(p.student, chunk, from, to, first, last, difference_grads<T>(p),
                        static_cast<T*>(p.sums), static_cast<T*>(p.grads.hidden), static_cast<T*>(scratch));
}

// Without a projection: real tokens [first, last), and their gradient where one is wanted.
template <class T>
void plain_differences(const ProjectedMSE& p, const int64_t* tokens, int64_t first, int64_t last,
                       void* memory) {
  constexpr int64_t L = kLanes<T>;
  const Matrix &hidden = p.student.hidden, &other = p.hidden_t;
  const int64_t width = p.student.width, padded_width = padded(width);
  T* student = static_cast<T*>(memory);
  T* teacher = student + padded_width;
  for (int64_t i = first; i < last; ++i) {
    const int64_t token = tokens[i];
    load_as(hidden.dtype, hidden.data, token * hidden.row_stride, hidden.stride, width, padded_width, T(1),
            student);
    load_as(other.dtype, other.data, token * other.row_stride, other.stride, width, padded_width, T(1),
            teacher);
    Vec<T> sum{};
    for (int64_t d = 0; d < padded_width; d += L) {
      const Vec<T> difference = load(student + d) - load(teacher + d);
      sum += difference * difference;
      store(student + d, difference);
    }
    static_cast<T*>(p.rows)[token] = sum_of<T>(sum);
    if (p.grads.hidden == nullptr) continue;
    store_row(student, width, 2 * upstream_of<T>(p, token), static_cast<T*>(p.grads.hidden) + token * width);
  }
}

}  // namespace bertops::BERTOPS_ISA
