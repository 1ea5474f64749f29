// ALBERT's embedding: what factorized_embedding.cpp hands to the loops in factorized_embedding_*.h.
#pragma once

#include "cpu/heads.h"

namespace bertops {

constexpr int64_t kTokenTile = 64;  // tokens that meet the projection together
constexpr int64_t kDepth = 256;     // terms of a product that join it together
constexpr int64_t kHeightBlock = 64;

// (rows, E), or (E,) with `stride` alone; strides in elements. Null data: there is no such table.
struct Table {
  const void* data = nullptr;
  DType dtype = DType::kFloat;
  int64_t rows = 0, row_stride = 0, stride = 1;
};

// A dense result; null data: not asked for.
struct Dense {
  void* data = nullptr;
  DType dtype = DType::kFloat;
};

// Where a token stands, as dropout counts it.
struct Place {
  int32_t sequence, column;
};

struct Embedding {
  int64_t tokens = 0;                         // B N
  int64_t length = 0, width = 0, height = 0;  // N, E, and H, 0 without a projection
  Table word, position, token_type;
  const int64_t *word_row = nullptr, *position_row = nullptr, *type_row = nullptr;  // (tokens,)
  const Place* places = nullptr;     // (tokens,), null without dropout
  uint64_t seed = 0, keep_from = 0;  // a Philox word below keep_from drops its element
  double keep_scale = 1, eps = 0;
  // in the type of the computation
  const void *norm_weight = nullptr, *norm_bias = nullptr;  // (padded E), 0 beyond E
  const void* projection = nullptr;                         // packed by pack_projection
  bool with_bias = false;
  Dense out, mean, rstd;
};

struct EmbeddingGrads {
  const void* grad_out = nullptr;  // (B, N, H or E)
  DType dtype = DType::kFloat;
  int64_t batch_stride = 0, row_stride = 0, stride = 0;
  const void* projection = nullptr;  // packed by pack_projection_rows
  void* rows = nullptr;              // dx (tokens, E) in the type of the computation; null: no table needs it
  Dense sparse;                      // dx (tokens, E), 0 where the word is `padding`
  int64_t padding = -1;
  bool with_projection = false, with_bias = false, with_norm = false;
  void* parts = nullptr;  // sums of every part, part_size() elements each

  // whether dx or dy of every token is needed
  bool with_rows() const { return rows != nullptr || sparse.data != nullptr || with_norm; }
};

// One part sums up, in this order: dA (padded H, padded E), dc (padded H), dγ and dβ (padded E).
inline int64_t rounded(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }
inline int64_t padded_width(const Embedding& p) { return rounded(p.width, 2 * kPadding); }
inline int64_t padded_height(const Embedding& p) { return rounded(p.height, kHeightBlock); }
inline int64_t bias_offset(const Embedding& p) { return padded_height(p) * padded_width(p); }
inline int64_t norm_offset(const Embedding& p) { return bias_offset(p) + padded_height(p); }
inline int64_t part_size(const Embedding& p) { return norm_offset(p) + 2 * padded_width(p); }

// Rows of the packed projection and of the tiles that meet it: E, and 1 for the bias.
inline int64_t padded_depth(const Embedding& p) { return rounded(p.width + 1, kPadding); }

// Elements of scratch that a task needs.
inline int64_t forward_scratch(const Embedding& p) {
  const int64_t rows = 5 * padded_width(p);
  if (p.height == 0) return rows;
  return rows + (kTokenTile + kPadding) * padded_depth(p) + 2 * kPadding * kPadding;
}
inline int64_t backward_scratch(const Embedding& p) {
  const int64_t rows = 6 * padded_width(p);
  if (p.height == 0) return rows + 2 * padded_width(p) + kPadding;
  return rows + kTokenTile * (3 * padded_width(p) + padded_height(p) + 1);
}

}  // namespace bertops
