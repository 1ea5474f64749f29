// The gradients of a part of the tokens: rows dx of the tables, and the part's share of every sum over tokens.
// Included once per instruction set.
namespace bertops::BERTOPS_ISA {

// Element (k, column) of a matrix of `rows` rows in panels (columns / kPanel, rows, kPanel).
template <class T>
BERTOPS_INLINE int64_t in_panels(int64_t rows, int64_t k, int64_t column) {
  return column / kPanel<T> * rows * kPanel<T> + k * kPanel<T> + column % kPanel<T>;
}

// Rows [first, last) of the projection into panels of E, 0 beyond H and E. `row` is (padded E) scratch.
template <class T>
void pack_projection_rows(const Table& projection, const Embedding& p, int64_t first, int64_t last, void* row,
                          void* packed) {
  const int64_t height = padded_height(p), padded = padded_width(p);
  T *from = static_cast<T*>(row), *to = static_cast<T*>(packed);
  for (int64_t h = first; h < last; ++h) {
    load_as(projection.dtype, projection.data, h * projection.row_stride, projection.stride,
            h < p.height ? p.width : 0, padded, T(1), from);
    for (int64_t e = 0; e < padded; e += kLanes<T>) store(to + in_panels<T>(height, h, e), load(from + e));
  }
}

BERTOPS_INLINE int64_t grad_offset(const Embedding& p, const EmbeddingGrads& g, int64_t token) {
  return token / p.length * g.batch_stride + token % p.length * g.row_stride;
}

// do of `count` tokens in blocks (H / kHeightBlock, kTokenTile, kHeightBlock), 0 beyond H and in rows up to a whole
// micro-kernel.
template <class T>
inline void load_grad_out(const Embedding& p, const EmbeddingGrads& g, int64_t first, int64_t count,
                          T* blocks) {
  for (int64_t h = 0; h < p.height; h += kHeightBlock, blocks += kTokenTile * kHeightBlock) {
    const int64_t columns = min_of(kHeightBlock, p.height - h);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t offset = grad_offset(p, g, first + i) + h * g.stride;
      load_as(g.dtype, g.grad_out, offset, g.stride, columns, kHeightBlock, T(1), blocks + i * kHeightBlock);
    }
    const int64_t rows = round_up(count, kTileRows<T>);
    fill(blocks + count * kHeightBlock, (rows - count) * kHeightBlock, T(0));
  }
}

// sums (kHeightBlock) [+]= the columns of (count, kHeightBlock), summed from 0.
template <class T>
inline void join_rows(const T* rows, int64_t count, bool first, T* sums) {
  for (int64_t i = 0; i < kHeightBlock; i += kLanes<T>) {
    Vec<T> sum{};
    for (int64_t row = 0; row < count; ++row) sum += load(rows + row * kHeightBlock + i);
    store(sums + i, first ? sum : load(sums + i) + sum);
  }
}

// dA (padded H, padded E) [+]= do^T y, y (tokens, E) in panels of kTokenTile rows.
template <class T>
inline void add_projection_grad(const Embedding& p, int64_t count, const T* grad_blocks, const T* y,
                                bool first, T* sums) {
  constexpr int64_t W = kPanel<T>, R = kTileRows<T>;
  const int64_t padded = padded_width(p);
  for (int64_t column = 0; column < padded; column += W, y += kTokenTile * W) {
    for (int64_t h = 0; h < p.height; h += R) {
      const T* a = grad_blocks + h / kHeightBlock * kTokenTile * kHeightBlock + h % kHeightBlock;
      T* c = sums + h * padded + column;
      if (first) {
        micro_kernel<1, kTileVectors, false>(count, a, kHeightBlock, y, W, c, padded);
      } else {
        micro_kernel<1, kTileVectors, true>(count, a, kHeightBlock, y, W, c, padded);
      }
    }
  }
}

// dy (tokens, padded E) = do A.
template <class T>
inline void grad_of_rows(const Embedding& p, const EmbeddingGrads& g, int64_t count, const T* grad_blocks,
                         T* dy) {
  constexpr int64_t W = kPanel<T>, R = kTileRows<T>;
  const int64_t padded = padded_width(p), height = padded_height(p);
  const T* projection = static_cast<const T*>(g.projection);
  for (int64_t h = 0; h < height; h += kHeightBlock, grad_blocks += kTokenTile * kHeightBlock) {
    for (int64_t column = 0; column < padded; column += W) {
      const T* b = projection + in_panels<T>(height, h, column);
      for (int64_t row = 0; row < count; row += R) {
        const T* a = grad_blocks + row * kHeightBlock;
        T* c = dy + row * padded + column;
        if (h == 0) {
          micro_kernel<kHeightBlock, kTileVectors, false>(kHeightBlock, a, 1, b, W, c, padded);
        } else {
          micro_kernel<kHeightBlock, kTileVectors, true>(kHeightBlock, a, 1, b, W, c, padded);
        }
      }
    }
  }
}

// From dy of a token to dx, in place; dy ∘ x̂ and dy join the sums for γ and, behind them, for β unless null.
template <class T>
inline void layer_norm_backward(const Embedding& p, const T* normalised, T rstd, const T* factor, T* dy,
                                T* norm_sums) {
  constexpr int64_t L = kLanes<T>;
  const T* weight = static_cast<const T*>(p.norm_weight);
  Vec<T> sum{}, product{};
  for (int64_t i = 0; i < p.width; i += L) {
    Vec<T> d = load(dy + i);
    const Vec<T> x = load(normalised + i);
    if (p.places != nullptr) d = dropped(d, factor + i);
    if (norm_sums != nullptr) {
      T* bias_sums = norm_sums + padded_width(p);
      store(norm_sums + i, load(norm_sums + i) + d * x);
      store(bias_sums + i, load(bias_sums + i) + d);
    }
    d *= load(weight + i);
    sum += d;
    product += d * x;
    store(dy + i, d);
  }
  const T mean = sum_of<T>(sum) / static_cast<T>(p.width);
  const T along = sum_of<T>(product) / static_cast<T>(p.width);
  for (int64_t i = 0; i < p.width; i += L) {
    store(dy + i, (load(dy + i) - mean - load(normalised + i) * along) * rstd);
  }
}

template <class T>
inline void store_grad_row(const Embedding& p, const EmbeddingGrads& g, int64_t token, const T* dx) {
  if (g.rows != nullptr) load_row(dx, 1, p.width, p.width, T(1), static_cast<T*>(g.rows) + token * p.width);
  if (g.sparse.data == nullptr) return;
  if (p.word_row[token] == g.padding) {
    const int64_t bytes = p.width * bytes_of(g.sparse.dtype);
    __builtin_memset(static_cast<char*>(g.sparse.data) + token * bytes, 0, bytes);
  } else {
    store_as(g.sparse.dtype, dx, p.width, T(1), g.sparse.data, token * p.width);
  }
}

// Scratch of a tile. Without a projection its tokens follow each other in one row.
template <class T>
struct BackwardTile {
  T *normalised, *dy, *rstd;          // (tokens, padded E) and (tokens,)
  T* norm_sums;                       // for γ, then for β
  T *y = nullptr, *blocks = nullptr;  // see add_projection_grad and load_grad_out

  inline BackwardTile(Scratch<T>& scratch, const Embedding& p) {
    const int64_t padded = padded_width(p), tokens = p.height == 0 ? 1 : kTokenTile;
    norm_sums = scratch.take(2 * padded);
    normalised = scratch.take(tokens * padded);
    dy = scratch.take(tokens * padded);
    rstd = scratch.take(tokens);
    if (p.height == 0) return;
    y = scratch.take(tokens * padded);
    blocks = scratch.take(tokens * padded_height(p));
  }
};

// The normalised rows of a tile and, where dA is asked for, y in panels.
template <class T>
inline void load_tokens(const Embedding& p, const EmbeddingGrads& g, int64_t first, int64_t count,
                        const TokenRows<T>& rows, const BackwardTile<T>& tile) {
  const int64_t padded = padded_width(p);
  for (int64_t i = 0; i < count; ++i) {
    T* x = tile.normalised + i * padded;
    tile.rstd[i] = normalised_again(p, first + i, rows, x);
    fill(x + round_up(p.width, kLanes<T>), padded - round_up(p.width, kLanes<T>), T(0));
    if (!g.with_projection) continue;
    if (p.places != nullptr) dropout_factors(p, first + i, rows.factor);
    for (int64_t e = 0; e < padded; e += kLanes<T>) {
      store(tile.y + in_panels<T>(kTokenTile, i, e), affine(p, x, rows.factor, e));
    }
  }
}

// What do of a tile gives to the sums for the projection and its bias, and dy.
template <class T>
inline void project_back(const Embedding& p, const EmbeddingGrads& g, int64_t first, int64_t count,
                         const BackwardTile<T>& tile, bool first_tile, T* sums) {
  load_grad_out(p, g, first, count, tile.blocks);
  if (g.with_projection) add_projection_grad(p, count, tile.blocks, tile.y, first_tile, sums);
  for (int64_t h = 0; g.with_bias && h < p.height; h += kHeightBlock) {
    join_rows(tile.blocks + h * kTokenTile, count, first_tile, sums + bias_offset(p) + h);
  }
  if (g.with_rows()) grad_of_rows(p, g, count, tile.blocks, tile.dy);
}

// Tokens [first, last), whose sums go to part `part`.
template <class T>
void embedding_grads(const Embedding& p, const EmbeddingGrads& g, int64_t part, int64_t first, int64_t last,
                     void* memory) {
  Scratch<T> scratch{static_cast<T*>(memory)};
  const TokenRows<T> rows(scratch, p);
  const BackwardTile<T> tile(scratch, p);
  const int64_t padded = padded_width(p);
  T* sums = static_cast<T*>(g.parts) + part * part_size(p);
  T* norm_sums = g.with_norm ? sums + norm_offset(p) : nullptr;
  if (first >= last) fill(sums, part_size(p), T(0));
  if (g.with_norm) fill(norm_sums, 2 * padded, T(0));
  for (int64_t token = first; token < last; token += kTokenTile) {
    const int64_t count = min_of(kTokenTile, last - token);
    if (p.height > 0) {
      if (g.with_rows() || g.with_projection) load_tokens(p, g, token, count, rows, tile);
      project_back(p, g, token, count, tile, token == first, sums);
    }
    if (!g.with_rows()) continue;
    fill(tile.norm_sums, 2 * padded, T(0));
    for (int64_t i = 0; i < count; ++i) {
      const int64_t place = p.height > 0 ? i : 0;
      T *x = tile.normalised + place * padded, *dy = tile.dy + place * padded;
      if (p.height == 0) {
        tile.rstd[0] = normalised_again(p, token + i, rows, x);
        load_as(g.dtype, g.grad_out, grad_offset(p, g, token + i), g.stride, p.width, padded, T(1), dy);
      }
      if (p.places != nullptr) dropout_factors(p, token + i, rows.factor);
      layer_norm_backward(p, x, tile.rstd[place], rows.factor, dy, g.with_norm ? tile.norm_sums : nullptr);
      store_grad_row(p, g, token + i, dy);
    }
    if (g.with_norm) add_row(norm_sums, tile.norm_sums, 2 * padded, norm_sums);
  }
}

// to (elements) = the sum of the same place of all `count` parts, in their order.
template <class T>
void join_parts(const Embedding& p, const EmbeddingGrads& g, int64_t count, int64_t offset, int64_t elements,
                const Dense& to, int64_t to_offset, void* memory) {
  T* sum = static_cast<T*>(memory);
  const T* part = static_cast<const T*>(g.parts) + offset;
  for (int64_t i = 0; i < elements; ++i) sum[i] = part[i];
  for (int64_t other = 1; other < count; ++other) {
    add_row(sum, part + other * part_size(p), elements, sum);
  }
  store_as(to.dtype, sum, elements, T(1), to.data, to_offset);
}

}  // namespace bertops::BERTOPS_ISA
