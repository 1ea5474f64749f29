// The matrix products of one tile, all operands in padded scratch of one type. Included once per instruction set.
namespace bertops::BERTOPS_ISA {

// Rows of C that one micro-kernel holds in registers, beside kTileVectors vectors of columns: 16 accumulators of
// 32 registers with AVX-512, 8 of 16 with AVX2.
template <class T>
constexpr int kTileRows = kLanes<T> < 8 ? kLanes<T> : 8;
template <>
constexpr int kTileRows<float> = BERTOPS_ISA_LEVEL == 2 ? 8 : 4;
constexpr int kTileVectors = 2;

// C (kTileRows, V * lanes) = [C +] A (kTileRows, K) B (K, V * lanes); element (r, k) of A is a[r * kRow + k * a_k].
// Every block of K is summed from zero before it joins C: a running sum over many blocks would lose bits.
template <int kRow, int V, bool kAdd, class T>
BERTOPS_INLINE void micro_kernel(int64_t K, const T* a, int64_t a_k, const T* b, int64_t b_k, T* c,
                                 int64_t c_row) {
  constexpr int R = kTileRows<T>, L = kLanes<T>;
  Vec<T> sum[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int n = 0; n < V; ++n) sum[r][n] = Vec<T>{};
  }
#pragma GCC unroll 4
  for (int64_t k = 0; k < K; ++k) {
    Vec<T> row[V];
#pragma GCC unroll 4
    for (int n = 0; n < V; ++n) row[n] = load(b + n * L);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec<T> x = broadcast(a[r * kRow]);
#pragma GCC unroll 4
      for (int n = 0; n < V; ++n) sum[r][n] += x * row[n];
    }
    a += a_k;
    b += b_k;
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int n = 0; n < V; ++n) {
      T* to = c + r * c_row + n * L;
      store(to, kAdd ? load(to) + sum[r][n] : sum[r][n]);
    }
  }
}

// C (kTileRows, columns) = [C +] A B, columns a multiple of the vector length.
template <int kRow, bool kAdd, class T>
inline void tile_row(int64_t columns, int64_t K, const T* a, int64_t a_k, const T* b, int64_t b_k, T* c,
                     int64_t c_row) {
  constexpr int L = kLanes<T>;
  int64_t column = 0;
  for (; column + kTileVectors * L <= columns; column += kTileVectors * L) {
    micro_kernel<kRow, kTileVectors, kAdd>(K, a, a_k, b + column, b_k, c + column, c_row);
  }
  for (; column < columns; column += L) {
    micro_kernel<kRow, 1, kAdd>(K, a, a_k, b + column, b_k, c + column, c_row);
  }
}

}  // namespace bertops::BERTOPS_ISA
