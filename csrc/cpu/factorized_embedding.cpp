// CPU kernels of factorized_embedding: tensors in, tasks out. The loops are in factorized_embedding_*.h.
#include "cpu/factorized_embedding.h"

#include <string>

#include "common/philox.h"
#include "cpu/segment_sums.h"
#include "cpu/tasks.h"

#define BERTOPS_PER_ISA "cpu/factorized_embedding_isa.h"
#include "cpu/foreach_isa.h"

namespace bertops {
namespace {

using MaybeTensor = std::optional<Tensor>;
using SevenTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

constexpr int64_t kTokensPerPart = 1024, kMostParts = 32;  // with a projection, whose gradient is large
constexpr int64_t kTokensPerSmallPart = 256, kMostSmallParts = 256;
// Memory that one thread writes for the first time: where two reach a fresh huge page at once, both clear it.
constexpr int64_t kHugePage = int64_t{2} << 20;

int64_t tasks_for(int64_t items, int64_t per_task) { return (items + per_task - 1) / per_task; }

// The arguments of both schemas, with everything derived from them that lives as long as the call.
class EmbeddingCall {
 public:
  Embedding p;
  DType dtype;  // of the computation: kFloat or kDouble
  ScalarType scalar_type;
  int64_t tokens;

  EmbeddingCall(const Tensor& input_ids, const MaybeTensor& position_ids, const MaybeTensor& token_type_ids,
                const MaybeTensor& cu_seqlens, const Tensor& word, const MaybeTensor& position,
                const MaybeTensor& token_type, const MaybeTensor& norm_weight, const MaybeTensor& norm_bias,
                const MaybeTensor& projection, const MaybeTensor& projection_bias, double eps,
                double dropout_p, const MaybeTensor& seed)
      : batch_(input_ids.size(0)) {
    p.length = input_ids.size(1);
    p.width = word.size(1);
    p.eps = eps;
    p.tokens = tokens = batch_ * p.length;
    p.word = table_of(word);
    if (position) p.position = table_of(*position);
    if (token_type) p.token_type = table_of(*token_type);
    const bool in_double = p.word.dtype == DType::kDouble ||
                           (projection && dtype_of(projection->scalar_type()) == DType::kDouble);
    dtype = in_double ? DType::kDouble : DType::kFloat;
    scalar_type = in_double ? ScalarType::Double : ScalarType::Float;
    find_rows(input_ids, position_ids, token_type_ids, cu_seqlens, dropout_p > 0);
    set_norm(norm_weight, norm_bias, word);
    if (projection) {
      projection_ = plain_table_of(*projection);
      p.height = projection->size(0);
    }
    if (projection_bias) {
      bias_ = plain_table_of(*projection_bias);
      p.with_bias = true;
    }
    if (dropout_p > 0) {
      STD_TORCH_CHECK(seed && seed->scalar_type() == ScalarType::Long && seed->numel() == 1,
                      "bertops: seed must be one int64 with dropout");
      p.places = places_.data();
      p.seed = static_cast<uint64_t>(*static_cast<const int64_t*>(seed->data_ptr()));
      p.keep_from = std::min<uint64_t>(static_cast<uint64_t>(dropout_p * 4294967296.0), 4294967295u);
      p.keep_scale = 1 / (1 - dropout_p);
    }
  }

  Tensor new_buffer(const Tensor& like, int64_t elements) const {
    Tensor buffer = torch::stable::new_empty(like, {elements}, scalar_type);
    prefer_huge_pages(buffer);
    return buffer;
  }

  // A^T and the bias for the forward.
  void pack(const Tensor& like) {
    if (p.height == 0) return;
    const int64_t columns = 2 * kPadding, count = tasks_for(p.height, columns), depth = padded_depth(p);
    packed_ = new_buffer(like, count * columns * depth);
    p.projection = packed_->data_ptr();
    run_tasks(count, columns * depth * accumulator_bytes(dtype), [&](int64_t task, void* scratch) {
      BERTOPS_DISPATCH(dtype, pack_projection, projection_, bias_, p, task * columns, (task + 1) * columns,
                       scratch, packed_->data_ptr())
    });
  }

  // A for do A.
  void pack_rows(const Tensor& like, EmbeddingGrads& g) {
    if (p.height == 0) return;
    const int64_t height = padded_height(p);
    packed_ = new_buffer(like, height * padded_width(p));
    g.projection = packed_->data_ptr();
    run_tasks(height / kHeightBlock, padded_width(p) * accumulator_bytes(dtype),
              [&](int64_t task, void* scratch) {
                BERTOPS_DISPATCH(dtype, pack_projection_rows, projection_, p, task * kHeightBlock,
                                 (task + 1) * kHeightBlock, scratch, packed_->data_ptr())
              });
  }

 private:
  int64_t batch_;
  std::vector<int64_t> word_rows_, position_rows_, type_rows_;
  std::vector<Place> places_;
  std::vector<Tensor> copies_;
  std::vector<double> norm_;
  Table projection_, bias_;
  std::optional<Tensor> packed_;

  Table plain_table_of(const Tensor& x) {
    const bool matrix = x.dim() == 2;
    return {x.data_ptr(), dtype_of(x.scalar_type()), x.size(0), matrix ? x.stride(0) : 0,
            x.stride(matrix ? 1 : 0)};
  }

  // A table whose rows are dense, copied where they are not.
  Table table_of(const Tensor& x) {
    STD_TORCH_CHECK(x.dim() == 2 && x.size(1) == p.width, "bertops: tables must be (rows, E) of one width");
    if (p.width == 1 || x.stride(1) == 1) return plain_table_of(x);
    copies_.push_back(torch::stable::contiguous(x));
    return plain_table_of(copies_.back());
  }

  void find_rows(const Tensor& input_ids, const MaybeTensor& position_ids, const MaybeTensor& token_type_ids,
                 const MaybeTensor& cu_seqlens, bool with_dropout) {
    look_up("input_ids", input_ids, "word", p.word.rows, word_rows_);
    p.word_row = word_rows_.data();
    const bool by_columns = p.position.data != nullptr && !position_ids;
    if (by_columns || with_dropout) find_places(cu_seqlens);
    if (by_columns) look_up_columns();
    if (p.position.data != nullptr && position_ids) {
      look_up("position_ids", *position_ids, "position", p.position.rows, position_rows_);
    }
    p.position_row = position_rows_.data();
    if (p.token_type.data != nullptr) {
      if (token_type_ids) {
        look_up("token_type_ids", *token_type_ids, "token_type", p.token_type.rows, type_rows_);
      } else {
        type_rows_.resize(tokens);
      }
    }
    p.type_row = type_rows_.data();
  }

  // The row of every token, from (B, N) or (1, N) ids: nobody has looked at them under torch.compile.
  void look_up(const char* name, const Tensor& ids, const char* table, int64_t rows,
               std::vector<int64_t>& to) {
    STD_TORCH_CHECK(ids.dim() == 2 && (ids.size(0) == batch_ || ids.size(0) == 1) && ids.size(1) == p.length,
                    "bertops: ", name, " must have shape (B, N) or (1, N)");
    to.resize(tokens);
    switch (ids.scalar_type()) {
      case ScalarType::Long: return look_up_as<int64_t>(name, ids, table, rows, to.data());
      case ScalarType::Int: return look_up_as<int32_t>(name, ids, table, rows, to.data());
      default: STD_TORCH_CHECK(false, "bertops: ", name, " must be int64 or int32");
    }
  }

  template <class Id>
  void look_up_as(const char* name, const Tensor& ids, const char* table, int64_t rows, int64_t* to) {
    const Id* from = static_cast<const Id*>(ids.data_ptr());
    const bool shared = ids.size(0) == 1;
    const int64_t batch_stride = shared ? 0 : ids.stride(0), stride = ids.stride(1);
    for (int64_t b = 0; b < batch_; ++b, from += batch_stride) {
      for (int64_t i = 0; i < p.length; ++i) {
        const int64_t row = from[i * stride];
        STD_TORCH_CHECK(row >= 0 && row < rows, name, " must be from 0 to ", rows - 1, ", the rows of ",
                        table, ", got ", row, " at [", shared ? 0 : b, ", ", i, "]");
        *to++ = row;
      }
    }
  }

  void find_places(const MaybeTensor& cu_seqlens) {
    STD_TORCH_CHECK(!cu_seqlens || batch_ == 1, "bertops: with cu_seqlens the rows are packed into B = 1");
    const Rows rows(batch_, p.length, std::nullopt, cu_seqlens);
    places_.reserve(tokens);
    for (const Sequence& sequence : rows.sequences) {
      const int32_t identity = static_cast<int32_t>(sequence.identity);
      for (int64_t i = 0; i < sequence.length; ++i) places_.push_back({identity, static_cast<int32_t>(i)});
    }
  }

  void look_up_columns() {
    position_rows_.resize(tokens);
    for (int64_t token = 0; token < tokens; ++token) {
      const int64_t column = places_[token].column;
      STD_TORCH_CHECK(column < p.position.rows,
                      "position must have a row for every position, of which it has ", p.position.rows,
                      ", got position ", column, " at [", token / p.length, ", ", token % p.length, "]");
      position_rows_[token] = column;
    }
  }

  // γ and β in the type of the computation, one behind the other, padded with 0.
  void set_norm(const MaybeTensor& weight, const MaybeTensor& bias, const Tensor& word) {
    const int64_t padded = padded_width(p);
    norm_.resize(2 * padded);
    BERTOPS_DISPATCH(dtype, load_norm, weight ? plain_table_of(*weight) : Table{},
                     bias ? plain_table_of(*bias) : Table{}, p, norm_.data())
    p.norm_weight = norm_.data();
    p.norm_bias = reinterpret_cast<const char*>(norm_.data()) + padded * accumulator_bytes(dtype);
  }
};

Dense dense(const Tensor& x) { return {x.data_ptr(), dtype_of(x.scalar_type())}; }

std::tuple<Tensor, Tensor, Tensor> factorized_embedding_fwd(
    const Tensor& input_ids, MaybeTensor position_ids, MaybeTensor token_type_ids, MaybeTensor cu_seqlens,
    const Tensor& word, MaybeTensor position, MaybeTensor token_type, MaybeTensor norm_weight,
    MaybeTensor norm_bias, MaybeTensor projection, MaybeTensor projection_bias, double eps, double dropout_p,
    MaybeTensor seed) {
  EmbeddingCall call(input_ids, position_ids, token_type_ids, cu_seqlens, word, position, token_type,
                     norm_weight, norm_bias, projection, projection_bias, eps, dropout_p, seed);
  Embedding& p = call.p;
  const int64_t batch = input_ids.size(0), length = p.length;
  const ScalarType moments = accumulator_dtype(word.scalar_type());
  Tensor mean = torch::stable::new_empty(word, {batch, length}, moments);
  Tensor rstd = torch::stable::new_empty(word, {batch, length}, moments);
  Tensor out = torch::stable::new_empty(projection ? *projection : word,
                                        {batch, length, projection ? p.height : p.width});
  if (call.tokens == 0) return {out, mean, rstd};
  prefer_huge_pages(out);
  p.out = dense(out);
  p.mean = dense(mean);
  p.rstd = dense(rstd);
  call.pack(word);
  const int64_t row_bytes = out.size(2) * out.element_size();
  const int64_t tiles = std::max<int64_t>(1, kHugePage / (row_bytes * kTokenTile));
  const int64_t fair = call.tokens / (4 * torch::stable::get_num_threads() * kTokenTile);
  const int64_t step = kTokenTile * std::max<int64_t>(1, std::min(tiles, fair));
  run_tasks(tasks_for(call.tokens, step), forward_scratch(p) * accumulator_bytes(call.dtype),
            [&](int64_t task, void* scratch) {
              const int64_t first = task * step, last = std::min(call.tokens, first + step);
              BERTOPS_DISPATCH(call.dtype, embed_tokens, p, first, last, scratch)
            });
  return {out, mean, rstd};
}

// The gradient of a table from dx of every token.
Tensor table_grad(const EmbeddingCall& call, const Tensor& table, const Tensor& rows, const int64_t* row_of,
                  int64_t padding) {
  const int64_t keys = table.size(0), width = table.size(1), bytes = accumulator_bytes(call.dtype);
  Tensor grad = torch::stable::new_empty(table, {keys, width});
  prefer_huge_pages(grad);
  const SortedRows sorted(row_of, call.tokens, keys, padding);
  SegmentSums s{rows.data_ptr(),
                width,
                row_of,
                sorted.order.data(),
                sorted.begin.data(),
                keys,
                static_cast<int64_t>(sorted.order.size()),
                grad.data_ptr(),
                dtype_of(table.scalar_type()),
                nullptr};
  Tensor partial = call.new_buffer(table, 2 * s.chunks() * width);
  s.partial = partial.data_ptr();
  const int64_t keys_per_task = std::max<int64_t>(1, 2 * kHugePage / (width * bytes));
  const int64_t clearing = tasks_for(keys, keys_per_task);
  run_tasks(clearing + s.chunks(), width * bytes, [&](int64_t task, void* scratch) {
    if (task < clearing) {
      const int64_t first = task * keys_per_task, last = std::min(keys, first + keys_per_task);
      BERTOPS_CALL_ISA(clear_absent, s, first, last)
    } else {
      BERTOPS_DISPATCH(call.dtype, sum_chunk, s, task - clearing, scratch)
    }
  });
  run_tasks(s.chunks(), 0, [&](int64_t chunk, void*) { BERTOPS_DISPATCH(call.dtype, join_chunks, s, chunk) });
  return grad;
}

SevenTensors factorized_embedding_bwd(const Tensor& grad_out, const Tensor& input_ids,
                                      MaybeTensor position_ids, MaybeTensor token_type_ids,
                                      MaybeTensor cu_seqlens, const Tensor& word, MaybeTensor position,
                                      MaybeTensor token_type, MaybeTensor norm_weight, MaybeTensor norm_bias,
                                      MaybeTensor projection, MaybeTensor projection_bias, double eps,
                                      double dropout_p, MaybeTensor seed, const Tensor& mean,
                                      const Tensor& rstd, std::optional<int64_t> padding_idx,
                                      std::optional<int64_t> position_padding_idx, bool sparse,
                                      std::vector<bool> wanted) {
  EmbeddingCall call(input_ids, position_ids, token_type_ids, cu_seqlens, word, position, token_type,
                     norm_weight, norm_bias, projection, projection_bias, eps, dropout_p, seed);
  Embedding& p = call.p;
  const int64_t tokens = call.tokens, bytes = accumulator_bytes(call.dtype);
  STD_TORCH_CHECK(wanted.size() == 7, "bertops: wanted must have an entry for each of 7 parameters");
  STD_TORCH_CHECK(grad_out.dim() == 3 && grad_out.size(0) == input_ids.size(0) &&
                      grad_out.size(1) == p.length && grad_out.size(2) == (projection ? p.height : p.width),
                  "bertops: grad_out must have the shape of the output");
  const Tensor means = torch::stable::contiguous(mean), rstds = torch::stable::contiguous(rstd);
  STD_TORCH_CHECK(means.numel() == tokens && rstds.numel() == tokens,
                  "bertops: mean and rstd must be those of the forward");
  p.mean = dense(means);
  p.rstd = dense(rstds);

  EmbeddingGrads g;
  g.grad_out = grad_out.data_ptr();
  g.dtype = dtype_of(grad_out.scalar_type());
  g.batch_stride = grad_out.stride(0);
  g.row_stride = grad_out.stride(1);
  g.stride = grad_out.stride(2);
  g.padding = padding_idx.value_or(-1);
  const bool with_word = wanted[0], with_position = position && wanted[1],
             with_type = token_type && wanted[2];
  const bool with_weight = norm_weight && wanted[3], with_bias = norm_bias && wanted[4];
  g.with_norm = with_weight || with_bias;
  g.with_projection = projection && wanted[5];
  g.with_bias = projection_bias && wanted[6];

  const auto none = [&] { return torch::stable::new_empty(word, {0}); };
  SevenTensors grads{none(), none(), none(), none(), none(), none(), none()};
  auto& [d_word, d_position, d_type, d_weight, d_norm_bias, d_projection, d_bias] = grads;
  std::optional<Tensor> rows;
  if ((with_word && !sparse) || with_position || with_type) {
    rows = call.new_buffer(word, tokens * p.width);
    g.rows = rows->data_ptr();
  }
  if (with_word && sparse) {
    d_word = torch::stable::new_empty(word, {tokens, p.width});
    prefer_huge_pages(d_word);
    g.sparse = dense(d_word);
  }

  const bool large = g.with_projection;
  const int64_t shortest = large ? kTokensPerPart : kTokensPerSmallPart;
  const int64_t longest = tasks_for(tokens, large ? kMostParts : kMostSmallParts);
  // whatever the threads, the same parts
  const int64_t part_tokens = rounded(std::max(shortest, longest), kTokenTile);
  const int64_t parts = std::max<int64_t>(1, tasks_for(tokens, part_tokens));
  const Tensor sums = call.new_buffer(word, parts * part_size(p));
  g.parts = sums.data_ptr();
  call.pack_rows(word, g);
  run_tasks(parts, backward_scratch(p) * bytes, [&](int64_t part, void* scratch) {
    const int64_t first = part * part_tokens, last = std::min(tokens, first + part_tokens);
    BERTOPS_DISPATCH(call.dtype, embedding_grads, p, g, part, first, last, scratch)
  });

  const auto join = [&](const Tensor& like, int64_t offset, int64_t row_stride) {
    const int64_t columns = like.size(like.dim() - 1), count = like.dim() == 2 ? like.size(0) : 1;
    Tensor grad = like.dim() == 2 ? torch::stable::new_empty(like, {count, columns})
                                  : torch::stable::new_empty(like, {columns});
    const Dense to = dense(grad);
    run_tasks(tasks_for(count, kHeightBlock), columns * bytes, [&](int64_t task, void* scratch) {
      for (int64_t row = task * kHeightBlock; row < std::min(count, (task + 1) * kHeightBlock); ++row) {
        BERTOPS_DISPATCH(call.dtype, join_parts, p, g, parts, offset + row * row_stride, columns, to,
                         row * columns, scratch)
      }
    });
    return grad;
  };
  if (with_weight) d_weight = join(*norm_weight, norm_offset(p), 0);
  if (with_bias) d_norm_bias = join(*norm_bias, norm_offset(p) + padded_width(p), 0);
  if (g.with_projection) d_projection = join(*projection, 0, padded_width(p));
  if (g.with_bias) d_bias = join(*projection_bias, bias_offset(p), 0);
  if (with_word && !sparse) d_word = table_grad(call, word, *rows, p.word_row, g.padding);
  if (with_position) {
    d_position = table_grad(call, *position, *rows, p.position_row, position_padding_idx.value_or(-1));
  }
  if (with_type) d_type = table_grad(call, *token_type, *rows, p.type_row, -1);
  return grads;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bertops, CPU, m) {
  m.impl("factorized_embedding_fwd", TORCH_BOX(&factorized_embedding_fwd));
  m.impl("factorized_embedding_bwd", TORCH_BOX(&factorized_embedding_bwd));
}

}  // namespace bertops
