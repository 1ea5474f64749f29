// The gradient of an embedding table: rows of a gradient summed by id, in the order of the tokens.
#include <cstdint>
#include <optional>

#include "cuda/dtypes.cuh"
#include "cuda/launch.cuh"

namespace bertops {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kTokensOfChunk = 32;
constexpr int64_t kPartsOfChunk = 64;
constexpr int kAhead = 8;  // rows that a thread loads before it adds the first
constexpr int64_t kNone = -1;

// ---- CUDA kernel

// A list sorted by id. What is to be left out has the id kNone and is never loaded: ids outside the table, padding,
// and slots that a chunk had no use for.
struct SortedRows {
  const void* ids;
  bool wide;             // int64, else int32
  const int64_t* order;  // places in `ids` and of the rows, or null: as they stand
  int64_t count, table_rows, padding;
  const void* rows;  // (count, width)
  int64_t width;

  __device__ __forceinline__ int64_t place(int64_t k) const { return order == nullptr ? k : order[k]; }

  __device__ __forceinline__ int64_t id(int64_t place) const {
    const int64_t id =
        wide ? static_cast<const int64_t*>(ids)[place] : static_cast<const int32_t*>(ids)[place];
    return id < 0 || id >= table_rows || id == padding ? kNone : id;
  }
};

// Sums of ids that a chunk shares with its neighbours: for chunk c slot 2 c is shared with chunk c - 1, slot
// 2 c + 1 with chunk c + 1. They are again a sorted list.
struct Shared {
  int64_t* ids;
  float* rows;
};

struct Split {
  int64_t chunk, chunks;
  int threads_of_chunk;  // a power of two
  int64_t parts;         // groups of threads that share the columns of a chunk
};

template <class T, int kTogether>
struct alignas(kTogether * sizeof(T)) Together {
  T x[kTogether];
};

template <class T, int kTogether>
__device__ __forceinline__ void store_sum(T* to, const float* sum, bool zero = false) {
  Together<T, kTogether> together;
#pragma unroll
  for (int i = 0; i < kTogether; ++i) together.x[i] = from_float<T>(zero ? 0.0f : sum[i]);
  *reinterpret_cast<Together<T, kTogether>*>(to) = together;
}

template <class Row, class T, int kTogether>
__global__ void __launch_bounds__(kThreads)
    segment_sums_kernel(SortedRows from, Split split, T* table, Shared shared) {
  const int64_t chunks_of_block = kThreads / split.threads_of_chunk;
  const int64_t blocks = (split.chunks + chunks_of_block - 1) / chunks_of_block * split.parts;
  const int lane = threadIdx.x % split.threads_of_chunk;
  for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    const int64_t chunk = block / split.parts * chunks_of_block + threadIdx.x / split.threads_of_chunk;
    const int64_t column = (block % split.parts * split.threads_of_chunk + lane) * kTogether;
    if (chunk >= split.chunks || column >= from.width) continue;
    const int64_t begin = chunk * split.chunk;
    const int64_t end = begin + split.chunk < from.count ? begin + split.chunk : from.count;
    const int64_t before = begin > 0 ? from.id(from.place(begin - 1)) : kNone;
    const int64_t after = end < from.count ? from.id(from.place(end)) : kNone;

    int64_t current = kNone, first_shared = kNone, last_shared = kNone;
    float sum[kTogether] = {};
    const auto finish = [&] {
      if (current == kNone) return;
      const bool with_before = current == before, with_after = current == after;
      if (!with_before && !with_after) {
        store_sum<T, kTogether>(table + current * from.width + column, sum);
        return;
      }
      if (with_after) {
        last_shared = current;
        store_sum<float, kTogether>(shared.rows + (2 * chunk + 1) * from.width + column, sum, with_before);
      }
      if (with_before) {
        first_shared = current;
        store_sum<float, kTogether>(shared.rows + 2 * chunk * from.width + column, sum);
      }
    };

    for (int64_t k = begin; k < end; k += kAhead) {
      int64_t ids[kAhead];
      Together<Row, kTogether> rows[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int64_t place = k + i < end ? from.place(k + i) : 0;
        ids[i] = k + i < end ? from.id(place) : kNone;
        if (ids[i] != kNone)
          rows[i] = *reinterpret_cast<const Together<Row, kTogether>*>(static_cast<const Row*>(from.rows) +
                                                                       place * from.width + column);
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (ids[i] != current) {
          finish();
          current = ids[i];
#pragma unroll
          for (int j = 0; j < kTogether; ++j) sum[j] = 0;
        }
        if (current == kNone) continue;
#pragma unroll
        for (int j = 0; j < kTogether; ++j) sum[j] += to_float(rows[i].x[j]);
      }
    }
    finish();
    if (column == 0 && split.chunks > 1) {
      shared.ids[2 * chunk] = first_shared;
      shared.ids[2 * chunk + 1] = last_shared;
    }
  }
}

// ---- kernel launcher

template <class Row>
void sum_segments(const Tensor& grad_rows, const SortedRows& from, const Split& split, const Tensor& table,
                  const Shared& shared, bool together) {
  with_float_type("dtype", table.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const auto run = [&](void (*kernel)(SortedRows, Split, T*, Shared)) {
      const int64_t blocks = ceil_div(split.chunks, kThreads / split.threads_of_chunk) * split.parts;
      launch("_embedding_table_grad", grad_rows, {blocks, kThreads}, kernel, from, split,
             static_cast<T*>(table.data_ptr()), shared);
    };
    // A gradient has the dtype of its table, or is a sum in fp32.
    if constexpr (std::is_same_v<Row, float> || std::is_same_v<Row, T>) {
      run(together ? segment_sums_kernel<Row, T, 4> : segment_sums_kernel<Row, T, 1>);
    } else {
      STD_TORCH_CHECK(false, "bertops: grad_rows must be float32 or of the dtype of the table");
    }
  });
}

// Sums of grad_rows (count, E) by `ids`, which `order` sorts, to (rows, E). Each round sums the segments of fixed
// chunks, whatever their ids; segments that cross into another chunk go on to the next round.
Tensor embedding_table_grad(const Tensor& grad_rows, const Tensor& ids, const Tensor& order, int64_t rows,
                            const std::optional<int64_t>& padding_idx, ScalarType dtype) {
  const DeviceGuard guard(grad_rows.get_device_index());
  const Tensor dense = torch::stable::contiguous(grad_rows), dense_ids = torch::stable::contiguous(ids);
  const Tensor dense_order = torch::stable::contiguous(order);
  const int64_t width = dense.size(1);
  Tensor table = torch::stable::new_zeros(dense, {rows, width}, dtype);
  SortedRows from{dense_ids.data_ptr(),
                  dense_ids.scalar_type() == ScalarType::Long,
                  static_cast<const int64_t*>(dense_order.data_ptr()),
                  dense.size(0),
                  rows,
                  padding_idx.value_or(kNone),
                  dense.data_ptr(),
                  width};
  if (from.count == 0 || width == 0) return table;
  const bool together = width % 4 == 0 && reinterpret_cast<uintptr_t>(dense.data_ptr()) % 16 == 0;
  const int64_t units = together ? width / 4 : width;
  Split split{kTokensOfChunk, ceil_div(from.count, kTokensOfChunk), 1};
  while (split.threads_of_chunk < kThreads && split.threads_of_chunk < units) split.threads_of_chunk *= 2;
  split.parts = ceil_div(units, split.threads_of_chunk);

  Tensor shared_ids = dense_ids, shared_rows = dense;  // keep what a round reads until it is launched
  for (bool tokens = true;; tokens = false) {
    const int64_t slots = split.chunks > 1 ? 2 * split.chunks : 0;
    Tensor next_ids = torch::stable::new_empty(dense_ids, {slots}, ScalarType::Long);
    Tensor next_rows = torch::stable::new_empty(dense, {slots, width}, ScalarType::Float);
    const Shared next{static_cast<int64_t*>(next_ids.data_ptr()), static_cast<float*>(next_rows.data_ptr())};
    if (tokens) {
      with_float_type("grad_rows", dense.scalar_type(), [&](auto zero) {
        sum_segments<decltype(zero)>(dense, from, split, table, next, together);
      });
    } else {
      sum_segments<float>(dense, from, split, table, next, together);
    }
    if (slots == 0) return table;
    from = {next.ids, true, nullptr, slots, rows, kNone, next.rows, width};
    split.chunk = kPartsOfChunk;
    split.chunks = ceil_div(slots, kPartsOfChunk);
    shared_ids = next_ids;
    shared_rows = next_rows;
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bertops, CUDA, m) {
  m.impl("_embedding_table_grad", TORCH_BOX(&embedding_table_grad));
}

}  // namespace bertops
