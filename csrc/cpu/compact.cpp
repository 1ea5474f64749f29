// Rows of a batch, or whole sequences of a packed one, moved together.
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "common/tensors.h"
#include "cpu/parallel.h"

namespace bertops {
namespace {

constexpr int64_t kBytesPerTask = int64_t{1} << 18;

// A block of bytes to copy, or to set to 0 where there is no source.
struct Move {
  const char* from;
  char* to;
  int64_t bytes;
};

void run_moves(const std::vector<Move>& moves) {
  int64_t bytes = 0;
  for (const Move& move : moves) bytes += move.bytes;
  const int64_t count = static_cast<int64_t>(moves.size());
  const int64_t tasks = std::min(count, (bytes + kBytesPerTask - 1) / kBytesPerTask);
  run_tasks(tasks, 0, [&](int64_t task, void*) {
    for (int64_t i = count * task / tasks; i < count * (task + 1) / tasks; ++i) {
      const Move& move = moves[i];
      if (move.from == nullptr) {
        std::memset(move.to, 0, move.bytes);
      } else {
        std::memcpy(move.to, move.from, move.bytes);
      }
    }
  });
}

int64_t checked_place(const Tensor& order, int64_t i, int64_t count) {
  const int64_t place = static_cast<const int64_t*>(order.data_ptr())[i * order.stride(0)];
  STD_TORCH_CHECK(place >= 0 && place < count, "order[", i, "] must be from 0 to ", count - 1, ", got ",
                  place);
  return place;
}

// `hidden` is dense. Rows from `num_kept` on are 0.
Tensor compact(const Tensor& hidden, const Tensor& order, const std::optional<Tensor>& num_kept) {
  const Tensor source = torch::stable::contiguous(hidden);
  std::vector<int64_t> sizes(source.sizes().begin(), source.sizes().end());
  const int64_t rows = order.size(0), batch = sizes[0];
  sizes[0] = rows;
  Tensor result = torch::stable::new_empty(source, sizes);
  prefer_huge_pages(result);
  int64_t bytes = source.element_size();
  for (size_t d = 1; d < sizes.size(); ++d) bytes *= sizes[d];
  const int64_t kept = num_kept ? *static_cast<const int64_t*>(num_kept->data_ptr()) : rows;
  const char* from = static_cast<const char*>(source.data_ptr());
  char* to = static_cast<char*>(result.data_ptr());
  std::vector<Move> moves(rows);
  for (int64_t i = 0; i < rows; ++i) {
    moves[i] = {i < kept ? from + checked_place(order, i, batch) * bytes : nullptr, to + i * bytes, bytes};
  }
  run_moves(moves);
  return result;
}

std::tuple<Tensor, Tensor> compact_packed(const Tensor& hidden, const Tensor& cu_seqlens, const Tensor& order,
                                          int64_t num_tokens) {
  const Tensor source = torch::stable::contiguous(hidden);
  std::vector<int64_t> sizes(source.sizes().begin(), source.sizes().end());
  const int64_t sequences = order.size(0), length = sizes[1];
  sizes[1] = num_tokens;
  Tensor result = torch::stable::new_empty(source, sizes);
  Tensor offsets = torch::stable::new_empty(cu_seqlens, {sequences + 1});
  prefer_huge_pages(result);
  int64_t bytes = source.element_size();
  for (size_t d = 2; d < sizes.size(); ++d) bytes *= sizes[d];
  const int32_t* offset = static_cast<const int32_t*>(cu_seqlens.data_ptr());
  const int64_t stride = cu_seqlens.stride(0), count = cu_seqlens.size(0) - 1;
  const char* from = static_cast<const char*>(source.data_ptr());
  char* to = static_cast<char*>(result.data_ptr());
  int32_t* new_offset = static_cast<int32_t*>(offsets.data_ptr());
  std::vector<Move> moves(sequences);
  int64_t next = 0;
  for (int64_t i = 0; i < sequences; ++i) {
    const int64_t place = checked_place(order, i, count);
    const int64_t begin = offset[place * stride], end = offset[(place + 1) * stride];
    STD_TORCH_CHECK(0 <= begin && begin <= end && end <= length && next + end - begin <= num_tokens,
                    "num_tokens must be the tokens of the sequences in order, got ", num_tokens);
    moves[i] = {from + begin * bytes, to + next * bytes, (end - begin) * bytes};
    new_offset[i] = static_cast<int32_t>(next);
    next += end - begin;
  }
  STD_TORCH_CHECK(next == num_tokens, "num_tokens must be the ", next,
                  " tokens of the sequences in order, got ", num_tokens);
  new_offset[sequences] = static_cast<int32_t>(next);
  run_moves(moves);
  return {result, offsets};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bertops, CPU, m) {
  m.impl("compact", TORCH_BOX(&compact));
  m.impl("compact_packed", TORCH_BOX(&compact_packed));
}

}  // namespace bertops
