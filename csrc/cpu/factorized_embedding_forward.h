// The embedding of a tile of tokens, and its product with the projection. Included once per instruction set.
namespace bertops::BERTOPS_ISA {

// Columns of a panel: what one micro-kernel computes side by side.
template <class T>
constexpr int64_t kPanel = kTileVectors * kLanes<T>;

// Columns [first, last) of A^T for the projection A (H, E) into panels (depth, kPanel), the bias below, 0 beyond.
// `memory` is (kPanel, depth) scratch.
template <class T>
void pack_projection(const Table& projection, const Table& bias, const Embedding& p, int64_t first,
                     int64_t last, void* memory, void* packed) {
  const int64_t depth = padded_depth(p);
  T* rows = static_cast<T*>(memory);
  for (int64_t panel = first; panel < last; panel += kPanel<T>) {
    for (int64_t i = 0; i < kPanel<T>; ++i) {
      const int64_t h = panel + i, width = h < p.height ? p.width : 0;
      load_as(projection.dtype, projection.data, h * projection.row_stride, projection.stride, width, depth,
              T(1), rows + i * depth);
      if (p.with_bias && width > 0) {
        load_as(bias.dtype, bias.data, h * bias.stride, 1, 1, 1, T(1), rows + i * depth + width);
      }
    }
    transpose(rows, depth, kPanel<T>, depth, static_cast<T*>(packed) + panel * depth, kPanel<T>);
  }
}

// C (kTileRows, kPanel) = A B over K terms, joined in blocks of kDepth.
template <class T>
inline void product_in_blocks(int64_t K, const T* a, int64_t a_k, const T* b, T* c, int64_t c_row) {
  micro_kernel<1, kTileVectors, false>(min_of(K, kDepth), a, a_k, b, kPanel<T>, c, c_row);
  for (int64_t k = kDepth; k < K; k += kDepth) {
    micro_kernel<1, kTileVectors, true>(min_of(K - k, kDepth), a + k * a_k, a_k, b + k * kPanel<T>, kPanel<T>,
                                        c, c_row);
  }
}

// Output rows of `count` tokens from `first` on; `tokens` are panels (count / L, depth, L).
template <class T, class Ahead>
inline void project(const Embedding& p, int64_t first, int64_t count, const T* tokens, T* block,
                    Ahead ahead) {
  constexpr int64_t L = kLanes<T>, R = kTileRows<T>, W = kPanel<T>;
  const int64_t depth = padded_depth(p), K = p.width + p.with_bias;
  const T* b = static_cast<const T*>(p.projection);
  for (int64_t column = 0; column < p.height; column += W, b += depth * W) {
    for (int64_t row = 0; row < count; row += R) {
      ahead.step();
      const T* a = tokens + row / L * L * depth + row % L;
      const int64_t offset = (first + row) * p.height + column;
      if (p.out.dtype == kDTypeOf<T> && column + W <= p.height && row + R <= count) {
        product_in_blocks(K, a, L, b, static_cast<T*>(p.out.data) + offset, p.height);
        continue;
      }
      product_in_blocks(K, a, L, b, block, W);
      for (int64_t i = 0; i < min_of(R, count - row); ++i) {
        store_as(p.out.dtype, block + i * W, min_of(W, p.height - column), T(1), p.out.data,
                 offset + i * p.height);
      }
    }
  }
}

template <class T>
void embed_tokens(const Embedding& p, int64_t first, int64_t last, void* memory) {
  Scratch<T> scratch{static_cast<T*>(memory)};
  const TokenRows<T> rows(scratch, p);
  if (p.height == 0) {
    T* y = scratch.take(padded_width(p));
    for (int64_t token = first; token < last; ++token) {
      embed(p, token, rows, y);
      store_as(p.out.dtype, y, p.width, T(1), p.out.data, token * p.width);
    }
    return;
  }
  const int64_t depth = padded_depth(p);
  T* few_rows = scratch.take(kPadding * depth);
  T* tokens = scratch.take(kTokenTile * depth);
  T* block = scratch.take(kTileRows<T> * kPanel<T>);
  for (int64_t token = first; token < last; token += kTokenTile) {
    const int64_t count = min_of(kTokenTile, last - token);
    fill_panels(count, depth, few_rows, tokens, [&](int64_t begin, int64_t end, T* to) {
      for (int64_t i = begin; i < end; ++i, to += depth) {
        embed(p, token + i, rows, to);
        to[p.width] = 1;
      }
    });
    const int64_t next = token + count;
    project(p, token, count, tokens, block, words_ahead(p, next, min_of(last, next + kTokenTile)));
  }
}

}  // namespace bertops::BERTOPS_ISA
