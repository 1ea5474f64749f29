// Rows of a batch, or whole sequences of a packed one, moved together.
#include <cstdio>
#include <optional>
#include <tuple>
#include <vector>

#include "cuda/block.cuh"
#include "cuda/launch.cuh"

namespace bertops {
namespace {

constexpr int kThreads = 256;
constexpr int kUnitsPerThread = 4;

// ---- CUDA kernels

__device__ __forceinline__ void stop_at_order(int64_t i, int64_t count, int64_t place) {
  printf("bertops: order[%lld] must be from 0 to %lld, got %lld\n", static_cast<long long>(i),
         static_cast<long long>(count - 1), static_cast<long long>(place));
  __trap();
}

// Where row i of the result comes from: a row of the source, or -1 for a row of zeros.

struct RowsInOrder {
  const int64_t* order;
  int64_t stride;
  const int64_t* num_kept;  // or null
  int64_t batch;

  // `speaks`: one thread of those that copy the row.
  __device__ __forceinline__ int64_t source(int64_t i, bool speaks) const {
    if (num_kept != nullptr && i >= *num_kept) return -1;
    const int64_t place = order[i * stride];
    if (place >= 0 && place < batch) return place;
    if (speaks) stop_at_order(i, batch, place);
    return -1;
  }
};

struct SequencesInOrder {
  const int32_t* cu_seqlens;
  int64_t cu_seqlens_stride;
  const int64_t* order;
  int64_t order_stride;
  const int32_t* offsets;  // of the result, `count` + 1
  int64_t count;

  __device__ __forceinline__ int64_t source(int64_t i, bool) const {
    int64_t low = 0, high = count - 1;  // the last sequence that starts at or before i
    while (low < high) {
      const int64_t middle = (low + high + 1) / 2;
      if (offsets[middle] <= i) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    return cu_seqlens[order[low * order_stride] * cu_seqlens_stride] + i - offsets[low];
  }
};

struct RowCopy {
  const char* from;
  char* to;
  int64_t rows, row_bytes, from_row;  // from_row: bytes between rows of the source
  int threads_per_row;                // a power of two
  int64_t parts;                      // blocks that share rows
};

template <class Unit, class Rows>
__global__ void __launch_bounds__(kThreads) copy_rows_kernel(RowCopy p, Rows rows) {
  const int64_t units = p.row_bytes / sizeof(Unit), rows_of_block = kThreads / p.threads_per_row;
  const int64_t blocks = (p.rows + rows_of_block - 1) / rows_of_block * p.parts;
  const int lane = threadIdx.x % p.threads_per_row;
  for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    const int64_t row = block / p.parts * rows_of_block + threadIdx.x / p.threads_per_row;
    const int64_t part = block % p.parts, first = part * p.threads_per_row * kUnitsPerThread + lane;
    if (row >= p.rows || first >= units) continue;
    const int64_t source = rows.source(row, part == 0 && lane == 0);
    const Unit* from = reinterpret_cast<const Unit*>(p.from + source * p.from_row);
    Unit* to = reinterpret_cast<Unit*>(p.to + row * p.row_bytes);
    Unit unit[kUnitsPerThread];
#pragma unroll
    for (int i = 0; i < kUnitsPerThread; ++i) {
      const int64_t at = first + i * p.threads_per_row;
      unit[i] = source >= 0 && at < units ? from[at] : Unit{};
    }
#pragma unroll
    for (int i = 0; i < kUnitsPerThread; ++i) {
      const int64_t at = first + i * p.threads_per_row;
      if (at < units) to[at] = unit[i];
    }
  }
}

// One block. `count` sequences, of `sequences` that hold `length` tokens.
__global__ void __launch_bounds__(kMaxThreads)
    offsets_kernel(const int32_t* cu_seqlens, int64_t cu_seqlens_stride, int64_t sequences, int64_t length,
                   const int64_t* order, int64_t order_stride, int64_t count, int64_t num_tokens,
                   int32_t* offsets) {
  int64_t before = 0;
  for (int64_t first = 0; first < count; first += blockDim.x) {
    const int64_t i = first + threadIdx.x;
    int64_t tokens = 0;
    if (i < count) {
      const int64_t place = order[i * order_stride];
      if (place < 0 || place >= sequences) {
        stop_at_order(i, sequences, place);
      } else {
        const int64_t begin = cu_seqlens[place * cu_seqlens_stride];
        const int64_t end = cu_seqlens[(place + 1) * cu_seqlens_stride];
        if (begin < 0 || end < begin || length < end) {
          printf("bertops: cu_seqlens must not decrease from 0 to %lld, got %lld before %lld\n",
                 static_cast<long long>(length), static_cast<long long>(begin), static_cast<long long>(end));
          __trap();
        }
        tokens = end - begin;
      }
    }
    const Prefix prefix = block_prefix(tokens);
    if (i < count) offsets[i] = static_cast<int32_t>(before + prefix.before);
    before += prefix.total;
  }
  if (threadIdx.x > 0) return;
  offsets[count] = static_cast<int32_t>(before);
  if (before == num_tokens) return;
  printf("bertops: num_tokens must be the %lld tokens of the sequences in order, got %lld\n",
         static_cast<long long>(before), static_cast<long long>(num_tokens));
  __trap();
}

// ---- kernel launchers

bool rows_are_dense(const Tensor& x, int64_t row_dim) {
  int64_t stride = 1;
  for (int64_t d = x.dim() - 1; d > row_dim; --d) {
    if (x.size(d) != 1 && x.stride(d) != stride) return false;
    stride *= x.size(d);
  }
  return true;
}

// Rows of `hidden` along `row_dim`, to `result`.
template <class Rows>
void copy_rows(const char* op, const Tensor& hidden, int64_t row_dim, const Tensor& result,
               const Rows& rows) {
  RowCopy p{static_cast<const char*>(hidden.data_ptr()), static_cast<char*>(result.data_ptr()),
            result.size(row_dim)};
  if (result.numel() == 0) return;
  p.row_bytes = result.numel() / p.rows * result.element_size();
  p.from_row = hidden.stride(row_dim) * hidden.element_size();
  const uint64_t places = reinterpret_cast<uintptr_t>(p.from) | p.row_bytes | p.from_row;

  const auto run = [&](auto zero) {
    using Unit = decltype(zero);
    const int64_t units = p.row_bytes / sizeof(Unit);
    p.threads_per_row = 1;
    while (p.threads_per_row < kThreads && p.threads_per_row * kUnitsPerThread < units)
      p.threads_per_row *= 2;
    p.parts = ceil_div(units, p.threads_per_row * kUnitsPerThread);
    const int64_t blocks = ceil_div(p.rows, kThreads / p.threads_per_row) * p.parts;
    launch(op, hidden, {blocks, kThreads}, copy_rows_kernel<Unit, Rows>, p, rows);
  };
  if (places % sizeof(uint4) == 0) return run(uint4{});
  if (places % sizeof(uint32_t) == 0) return run(uint32_t{});
  if (places % sizeof(uint16_t) == 0) return run(uint16_t{});
  return run(uint8_t{});
}

// Like `hidden`, with another number of rows.
Tensor new_rows(const Tensor& hidden, int64_t row_dim, int64_t rows) {
  std::vector<int64_t> sizes(hidden.sizes().begin(), hidden.sizes().end());
  sizes[row_dim] = rows;
  return torch::stable::new_empty(hidden, sizes);
}

Tensor compact(const Tensor& hidden, const Tensor& order, const std::optional<Tensor>& num_kept) {
  const DeviceGuard guard(hidden.get_device_index());
  const Tensor source = rows_are_dense(hidden, 0) ? hidden : torch::stable::contiguous(hidden);
  Tensor result = new_rows(source, 0, order.size(0));
  const int64_t* count = num_kept ? static_cast<const int64_t*>(num_kept->data_ptr()) : nullptr;
  copy_rows(
      "compact", source, 0, result,
      RowsInOrder{static_cast<const int64_t*>(order.data_ptr()), order.stride(0), count, source.size(0)});
  return result;
}

std::tuple<Tensor, Tensor> compact_packed(const Tensor& hidden, const Tensor& cu_seqlens, const Tensor& order,
                                          int64_t num_tokens) {
  const DeviceGuard guard(hidden.get_device_index());
  const Tensor source = rows_are_dense(hidden, 1) ? hidden : torch::stable::contiguous(hidden);
  const int64_t count = order.size(0);
  Tensor result = new_rows(source, 1, num_tokens);
  Tensor offsets = torch::stable::new_empty(cu_seqlens, {count + 1});
  const SequencesInOrder rows{static_cast<const int32_t*>(cu_seqlens.data_ptr()), cu_seqlens.stride(0),
                              static_cast<const int64_t*>(order.data_ptr()),      order.stride(0),
                              static_cast<const int32_t*>(offsets.data_ptr()),    count};
  launch("compact_packed", hidden, {1, kMaxThreads}, offsets_kernel, rows.cu_seqlens, rows.cu_seqlens_stride,
         cu_seqlens.size(0) - 1, source.size(1), rows.order, rows.order_stride, count, num_tokens,
         static_cast<int32_t*>(offsets.data_ptr()));
  copy_rows("compact_packed", source, 1, result, rows);
  return {result, offsets};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bertops, CUDA, m) {
  m.impl("compact", TORCH_BOX(&compact));
  m.impl("compact_packed", TORCH_BOX(&compact_packed));
}

}  // namespace bertops
