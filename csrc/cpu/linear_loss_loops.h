// The products of a linear layer under a loss: outputs of a chunk of tokens, and from the gradients of these the
// gradients of hidden states, weight and bias. Operands are packed so that a micro-kernel reads along cache lines:
// one panel of columns stays in the first cache while rows go by. Included once per instruction set.
namespace bertops::BERTOPS_ISA {

template <class T>
constexpr int64_t kPanel = kTileVectors * kLanes<T>;
// Elements between packed rows: not a power of two, whose multiples share a place in the cache.
constexpr int64_t kRowPitch = kSumBlock + kPadding, kTokenPitch = kChunkTokens + kPadding;
constexpr int64_t kColumnGroup = HiddenTasks::kColumns;  // columns of a weight that are packed at a time

template <class T>
inline void load_token(const Matrix& hidden, const Chunk& chunk, int64_t i, int64_t width, int64_t padded_to,
                       T* to) {
  if (i < chunk.count) {
    load_as(hidden.dtype, hidden.data, chunk.token[i] * hidden.row_stride, hidden.stride, width, padded_to,
            T(1), to);
  } else {
    fill(to, padded_to, T(0));
  }
}

// Tokens of a block as the columns of panels (tokens / kPanel, padded(width), kPanel); `rows` is scratch of
// (lanes, padded(width)).
template <class T>
inline void pack_columns(const Linear& linear, const Chunk& chunk, int64_t block, T* rows, T* panels) {
  constexpr int64_t L = kLanes<T>, P = kPanel<T>;
  const int64_t width = padded(linear.width);
  for (int64_t first = block * kQueryBlock; first < (block + 1) * kQueryBlock; first += L) {
    for (int64_t i = 0; i < L; ++i) {
      load_token(linear.hidden, chunk, first + i, linear.width, width, rows + i * width);
    }
    transpose(rows, width, L, width, panels + first / P * P * width + first % P, P);
  }
}

// Tokens of a block as rows of panels (width / kPanel, tokens, kPanel).
template <class T>
inline void pack_rows(const Linear& linear, const Chunk& chunk, int64_t block, T* row, T* panels) {
  constexpr int64_t L = kLanes<T>, P = kPanel<T>;
  const int64_t width = round_up(linear.width, P), tokens = chunk.blocks * kQueryBlock;
  for (int64_t i = block * kQueryBlock; i < (block + 1) * kQueryBlock; ++i) {
    load_token(linear.hidden, chunk, i, linear.width, width, row);
    for (int64_t column = 0; column < width; column += L) {
      store(panels + (column / P * tokens + i) * P + column % P, load(row + column));
    }
  }
}

// Outputs [first, first + kOutputBlock) of the tokens of blocks [from, to), without the bias, into blocks of
// (padded(outputs), kQueryBlock). Then finish(block, column, tile) for a tile of kPanel tokens, still in the cache.
template <class T, class Finish>
inline void multiply_outputs(const Linear& linear, const Chunk& chunk, int64_t first, int64_t from,
                             int64_t to, const T* panels, T* outputs, T* packed, const Finish& finish) {
  constexpr int64_t P = kPanel<T>, R = kTileRows<T>;
  const int64_t width = linear.width, rows = min_of(kOutputBlock, linear.outputs - first);
  const int64_t packed_rows = round_up(rows, R);
  for (int64_t row = 0; row < packed_rows; ++row) {
    for (int64_t k = 0; k < width; k += kSumBlock) {
      const int64_t terms = min_of(kSumBlock, width - k);
      T* into = packed + k / kSumBlock * kOutputBlock * kRowPitch + row * kRowPitch;
      if (row < rows) {
        load_as(linear.weight.dtype, linear.weight.data,
                (first + row) * linear.weight.row_stride + k * linear.weight.stride, linear.weight.stride,
                terms, terms, T(1), into);
      } else {
        fill(into, terms, T(0));
      }
    }
  }
  for (int64_t block = from; block < to; ++block) {
    const int64_t tokens = min_of(kQueryBlock, chunk.count - block * kQueryBlock);
    for (int64_t column = 0; column < tokens; column += P) {
      const T* panel = panels + (block * kQueryBlock + column) * padded(width);
      T* tile = outputs + (block * padded(linear.outputs) + first) * kQueryBlock + column;
      for (int64_t k = 0; k < width; k += kSumBlock) {
        const int64_t terms = min_of(kSumBlock, width - k);
        const T* a = packed + k / kSumBlock * kOutputBlock * kRowPitch;
        for (int64_t row = 0; row < packed_rows; row += R) {
          T* c = tile + row * kQueryBlock;
          if (k == 0) {
            micro_kernel<kRowPitch, kTileVectors, false>(terms, a + row * kRowPitch, 1, panel, P, c,
                                                         kQueryBlock);
          } else {
            micro_kernel<kRowPitch, kTileVectors, true>(terms, a + row * kRowPitch, 1, panel + k * P, P, c,
                                                        kQueryBlock);
          }
        }
      }
      finish(block, column, tile);
    }
  }
}

template <class T>
BERTOPS_INLINE void prefetch_tile(const T* c, int64_t row) {
  for (int64_t r = 0; r < kTileRows<T>; ++r) {
    for (int64_t n = 0; n < kPanel<T>; n += kLanes<T>) __builtin_prefetch(c + r * row + n, 1);
  }
}

// Adds the gradients that the outputs [first, first + kOutputBlock) of a chunk give to their weights and biases.
// grad.lanes(block, column) has those of a vector of tokens, which at(output) returns. `panels` from pack_rows.
template <class T, class Grad>
inline void add_weight_grads(const Linear& linear, const Chunk& chunk, int64_t first, const Grad& grad,
                             const T* panels, const LinearGrads& to, T* packed) {
  constexpr int64_t L = kLanes<T>, P = kPanel<T>, R = kTileRows<T>;
  const int64_t width = linear.width, rows = min_of(kOutputBlock, linear.outputs - first);
  const int64_t packed_rows = round_up(rows, R), tokens = round_up(chunk.count, L);
  T* tile = packed + kOutputBlock * kTokenPitch;
  for (int64_t i = 0; i < tokens; i += L) {
    const auto lanes = grad.lanes(i / kQueryBlock, i % kQueryBlock);
    for (int64_t row = 0; row < rows; ++row) store(packed + row * kTokenPitch + i, lanes.at(first + row));
  }
  for (int64_t row = rows; row < packed_rows; ++row) fill(packed + row * kTokenPitch, tokens, T(0));
  if (to.bias != nullptr) {
    for (int64_t row = 0; row < rows; ++row) {
      Vec<T> sums{};
      for (int64_t i = 0; i < tokens; i += L) sums += load(packed + row * kTokenPitch + i);
      T* total = static_cast<T*>(to.bias) + first + row;
      *total = (chunk.first ? T(0) : *total) + sum_of<T>(sums);
    }
  }
  if (to.weight == nullptr) return;
  for (int64_t column = 0; column < width; column += P) {
    const int64_t columns = min_of(P, width - column);
    for (int64_t k = 0; k < chunk.count; k += kSumBlock) {
      const int64_t terms = min_of(kSumBlock, chunk.count - k);
      const bool add = k > 0 || !chunk.first;
      const T* panel = panels + (column / P * chunk.blocks * kQueryBlock + k) * P;
      for (int64_t row = 0; row < packed_rows; row += R) {
        const T* a = packed + row * kTokenPitch + k;
        T* c = static_cast<T*>(to.weight) + (first + row) * width + column;
        if (columns == P && row + R <= rows) {
          prefetch_tile(c, width);  // far apart, and not read since the last chunk
          if (add) {
            micro_kernel<kTokenPitch, kTileVectors, true>(terms, a, 1, panel, P, c, width);
          } else {
            micro_kernel<kTokenPitch, kTileVectors, false>(terms, a, 1, panel, P, c, width);
          }
          continue;
        }
        micro_kernel<kTokenPitch, kTileVectors, false>(terms, a, 1, panel, P, tile, P);
        for (int64_t r = 0; r < min_of(R, rows - row); ++r) {
          for (int64_t i = 0; i < columns; ++i) {
            c[r * width + i] = (add ? c[r * width + i] : T(0)) + tile[r * P + i];
          }
        }
      }
    }
  }
}

// Gradients of the tokens of blocks [from, to) in columns [first, last) of the hidden states, summed over all
// outputs in `sums` (tokens, width up to a panel) and stored. `packed` holds the outputs' gradients of the tokens,
// (tokens / lanes, kSumBlock, lanes), and kColumnGroup columns of kSumBlock rows of the weight.
template <class T, class Grad>
inline void store_hidden_grads(const Linear& linear, const Chunk& chunk, int64_t from, int64_t to,
                               int64_t first, int64_t last, const Grad& grad, T* sums, T* grad_hidden,
                               T* packed) {
  constexpr int64_t L = kLanes<T>, P = kPanel<T>, R = kTileRows<T>;
  const int64_t width = linear.width, sums_row = round_up(width, P);
  const int64_t begin = from * kQueryBlock, tokens = min_of(to * kQueryBlock, chunk.count) - begin;
  T* panels = packed + (to - from) * kQueryBlock * kSumBlock;
  T* weight_row = panels + kSumBlock * kColumnGroup;
  for (int64_t output = 0; output < linear.outputs; output += kSumBlock) {
    const int64_t terms = min_of(kSumBlock, linear.outputs - output);
    for (int64_t i = 0; i < tokens; i += L) {
      const auto lanes = grad.lanes(from + i / kQueryBlock, i % kQueryBlock);
      T* into = packed + i * kSumBlock;
      for (int64_t k = 0; k < terms; ++k) store(into + k * L, lanes.at(output + k));
    }
    for (int64_t group = first; group < last; group += kColumnGroup) {
      const int64_t columns = min_of(kColumnGroup, last - group), padded_columns = round_up(columns, P);
      for (int64_t k = 0; k < terms; ++k) {
        load_as(linear.weight.dtype, linear.weight.data,
                (output + k) * linear.weight.row_stride + group * linear.weight.stride, linear.weight.stride,
                columns, padded_columns, T(1), weight_row);
        for (int64_t column = 0; column < padded_columns; column += L) {
          store(panels + (column / P * kSumBlock + k) * P + column % P, load(weight_row + column));
        }
      }
      for (int64_t column = 0; column < columns; column += P) {
        for (int64_t i = 0; i < tokens; i += R) {
          const T* a = packed + i / L * L * kSumBlock + i % L;
          T* c = sums + (begin + i) * sums_row + group + column;
          if (output == 0) {
            micro_kernel<1, kTileVectors, false>(terms, a, L, panels + column * kSumBlock, P, c, sums_row);
          } else {
            micro_kernel<1, kTileVectors, true>(terms, a, L, panels + column * kSumBlock, P, c, sums_row);
          }
        }
      }
    }
  }
  for (int64_t i = begin; i < begin + tokens; ++i) {
    store_row(sums + i * sums_row + first, last - first, T(1), grad_hidden + chunk.token[i] * width + first);
  }
}

}  // namespace bertops::BERTOPS_ISA
