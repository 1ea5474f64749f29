// One pass over rows of logits: the largest, its class, and the sums of common/entropy.h.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <limits>

#include "cuda/block.cuh"
#include "cuda/dtypes.cuh"
#include "cuda/launch.cuh"

namespace bertops::cuda {

__device__ __forceinline__ float exp_of(float x) { return expf(x); }
__device__ __forceinline__ float log1p_of(float x) { return log1pf(x); }

}  // namespace bertops::cuda

#define BERTOPS_ISA cuda
#define BERTOPS_ENTROPY_INLINE __device__ __forceinline__
#include "common/entropy.h"
#undef BERTOPS_ISA
#undef BERTOPS_ENTROPY_INLINE

namespace bertops {

// ---- Rows as a kernel sees them

struct LogitRows {
  const void* data;
  int64_t rows, row_stride, stride;
  int classes;
  bool vectors;  // every row is a whole number of aligned 16-byte vectors
  int lanes;     // threads that share a row: a power of two within a warp, or all of the block
  float unit;    // what an entropy in nats is multiplied by
  float top;     // the largest entropy in that unit
};

constexpr int kVectorBytes = 16;

constexpr int kPiece = 8;  // classes that a thread holds at once: one vector, or two of fp32

// kPiece classes of a row from `first` on, interleaved with those of the other lanes so that neighbours read
// neighbours: vector by vector, or element by element where rows are not made of vectors.
template <class T, bool kVectors>
struct Piece {
  static constexpr int kTogether = kVectors ? kVectorBytes / sizeof(T) : 1;
  struct alignas(kTogether * sizeof(T)) Together {
    T x[kTogether];
  };
  int first, lane, lanes;
  float z[kPiece];  // -inf past the end

  __device__ __forceinline__ int class_of(int i) const {
    return first + (i / kTogether * lanes + lane) * kTogether + i % kTogether;
  }

  __device__ __forceinline__ void load(const T* row, int64_t stride, int classes) {
#pragma unroll
    for (int i = 0; i < kPiece; i += kTogether) {
      if (class_of(i) < classes) {
        const Together from = *reinterpret_cast<const Together*>(row + class_of(i) * (kVectors ? 1 : stride));
#pragma unroll
        for (int j = 0; j < kTogether; ++j) z[i + j] = to_float(from.x[j]);
      } else {
#pragma unroll
        for (int j = 0; j < kTogether; ++j) z[i + j] = -INFINITY;
      }
    }
  }

  // Row of unit stride.
  __device__ __forceinline__ void store(T* row, int classes) const {
#pragma unroll
    for (int i = 0; i < kPiece; i += kTogether) {
      if (class_of(i) < classes) {
        Together to;
#pragma unroll
        for (int j = 0; j < kTogether; ++j) to.x[j] = from_float<T>(z[i + j]);
        *reinterpret_cast<Together*>(row + class_of(i)) = to;
      }
    }
  }
};

// ---- Sums over a part of a row

struct RowSums {
  float largest;
  int index;             // its class
  float rest, weighted;  // over the classes but that one
};

// torch.argmax: NaN before numbers, the first of equals.
__device__ __forceinline__ bool beats(float a, int index_a, float b, int index_b) {
  const bool equal = a == b || (a != a && b != b);
  return equal ? index_a < index_b : a != a || a > b;
}

// Parts whose largest is -inf have neither sum yet: -inf - -inf is no distance.
__device__ __forceinline__ RowSums join(RowSums winner, const RowSums& other) {
  if (winner.largest == -INFINITY) return winner;
  const cuda::EntropyTerm<float> term = cuda::entropy_term(other.largest - winner.largest);
  winner.rest += term.power * (other.rest + 1);
  winner.weighted += term.power * other.weighted + term.weighted * (other.rest + 1);
  return winner;
}

template <class T, bool kVectors>
__device__ __forceinline__ RowSums thread_sums(const T* row, int64_t stride, int classes, int lane,
                                               int lanes) {
  RowSums sums{-INFINITY, std::numeric_limits<int>::max(), 0, 0};
  for (int first = 0; first < classes; first += lanes * kPiece) {
    Piece<T, kVectors> piece{first, lane, lanes};
    piece.load(row, stride, classes);
    RowSums top{piece.z[0], piece.class_of(0), 0, 0};
#pragma unroll
    for (int i = 1; i < kPiece; ++i) {
      if (top.largest == top.largest && !(piece.z[i] <= top.largest)) {
        top.largest = piece.z[i];
        top.index = piece.class_of(i);
      }
    }
    if (beats(top.largest, top.index, sums.largest, sums.index)) sums = join(top, sums);
    if (sums.largest == -INFINITY) continue;
#pragma unroll
    for (int i = 0; i < kPiece; ++i) {
      const cuda::EntropyTerm<float> term = cuda::entropy_term(piece.z[i] - sums.largest);
      const bool counts = piece.class_of(i) != sums.index;
      sums.rest += counts ? term.power : 0;
      sums.weighted += counts ? term.weighted : 0;
    }
  }
  return sums;
}

// Over `lanes` neighbouring threads of a warp; all of them get the result.
__device__ __forceinline__ RowSums join_lanes(RowSums sums, int lanes) {
  for (int step = lanes / 2; step > 0; step /= 2) {
    const RowSums other{
        __shfl_xor_sync(kAllLanes, sums.largest, step), __shfl_xor_sync(kAllLanes, sums.index, step),
        __shfl_xor_sync(kAllLanes, sums.rest, step), __shfl_xor_sync(kAllLanes, sums.weighted, step)};
    sums =
        beats(sums.largest, sums.index, other.largest, other.index) ? join(sums, other) : join(other, sums);
  }
  return sums;
}

__device__ __forceinline__ RowSums join_block(RowSums sums) {
  __shared__ RowSums sums_of_warp[kMaxWarps];
  const int lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  sums = join_lanes(sums, kWarp);
  __syncthreads();  // the sums of the row before have been read
  if (lane == 0) sums_of_warp[threadIdx.x / kWarp] = sums;
  __syncthreads();
  const RowSums none{-INFINITY, std::numeric_limits<int>::max(), 0, 0};
  return join_lanes(lane < warps ? sums_of_warp[lane] : none, kWarp);
}

// The row of this thread, which it shares with `lanes` - 1 others. Called by all threads of a block; a row that
// does not exist has no classes.
template <class T>
__device__ __forceinline__ RowSums row_sums(const LogitRows& logits, int64_t row) {
  const T* from = static_cast<const T*>(logits.data) + row * logits.row_stride;
  const int classes = row < logits.rows ? logits.classes : 0;
  const int lane = threadIdx.x % logits.lanes;
  const RowSums sums = logits.vectors
                           ? thread_sums<T, true>(from, 1, classes, lane, logits.lanes)
                           : thread_sums<T, false>(from, logits.stride, classes, lane, logits.lanes);
  return logits.lanes > kWarp ? join_block(sums) : join_lanes(sums, logits.lanes);
}

// ---- Host

// A row that would take a warp more than `kPiecesPerLane` steps is shared by a block: `lanes` threads, for the caller
// to make fewer.
inline LogitRows logit_rows(const Tensor& logits, bool normalize) {
  constexpr int kPiecesPerLane = 8;
  const int64_t bytes = logits.element_size(), classes = logits.size(1);
  STD_TORCH_CHECK(classes <= (int64_t{1} << 30), "bertops: logits must have at most 2^30 classes, got ",
                  classes);
  LogitRows p{};
  p.data = logits.data_ptr();
  p.rows = logits.size(0);
  p.row_stride = logits.stride(0);
  p.stride = logits.stride(1);
  p.classes = static_cast<int>(classes);
  p.vectors = (p.stride == 1 || classes == 1) && classes * bytes % kVectorBytes == 0 &&
              p.row_stride * bytes % kVectorBytes == 0 &&
              reinterpret_cast<uintptr_t>(p.data) % kVectorBytes == 0;
  const int64_t pieces = ceil_div(classes, kPiece);
  p.lanes = 1;
  while (p.lanes < kWarp && p.lanes < pieces) p.lanes *= 2;
  if (pieces > kPiecesPerLane * kWarp) p.lanes = kMaxThreads;
  const double largest = std::log(static_cast<double>(classes)),
               unit = normalize && classes > 1 ? 1 / largest : 1;
  p.unit = static_cast<float>(unit);
  p.top = static_cast<float>(largest * unit);
  return p;
}

}  // namespace bertops
