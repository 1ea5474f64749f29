// The entropy of every row of a batch of logits, and its gradient.
#include "cuda/entropy_rows.cuh"

namespace bertops {
namespace {

constexpr int kThreads = 256;

// ---- CUDA kernels

template <class T>
__global__ void __launch_bounds__(kMaxThreads) entropy_kernel(LogitRows logits, float* entropy) {
  const int64_t rows_of_block = blockDim.x / logits.lanes;
  for (int64_t first = blockIdx.x * rows_of_block; first < logits.rows; first += gridDim.x * rows_of_block) {
    const int64_t row = first + threadIdx.x / logits.lanes;
    const RowSums sums = row_sums<T>(logits, row);
    if (row < logits.rows && threadIdx.x % logits.lanes == 0) {
      entropy[row] = cuda::entropy_of(sums.largest, sums.rest, sums.weighted) * logits.unit;
    }
  }
}

template <class T, bool kVectors>
__device__ __forceinline__ void store_grad(const LogitRows& logits, int64_t row, const RowSums& sums,
                                           float grad, T* to) {
  const T* from = static_cast<const T*>(logits.data) + row * logits.row_stride;
  for (int first = 0; first < logits.classes; first += logits.lanes * kPiece) {
    Piece<T, kVectors> piece{first, static_cast<int>(threadIdx.x % logits.lanes), logits.lanes};
    piece.load(from, logits.stride, logits.classes);
#pragma unroll
    for (int i = 0; i < kPiece; ++i) {
      const cuda::EntropyTerm<float> term = cuda::entropy_term(piece.z[i] - sums.largest);
      piece.z[i] = grad * cuda::entropy_grad(term, sums.largest, sums.rest, sums.weighted);
    }
    piece.store(to, logits.classes);
  }
}

template <class T>
__global__ void __launch_bounds__(kMaxThreads)
    entropy_grad_kernel(LogitRows logits, const float* grad, int64_t grad_stride, T* grad_logits) {
  const int64_t rows_of_block = blockDim.x / logits.lanes;
  for (int64_t first = blockIdx.x * rows_of_block; first < logits.rows; first += gridDim.x * rows_of_block) {
    const int64_t row = first + threadIdx.x / logits.lanes;
    const RowSums sums = row_sums<T>(logits, row);
    if (row >= logits.rows) continue;
    const float scaled = grad[row * grad_stride] * logits.unit;
    T* to = grad_logits + row * logits.classes;
    if (logits.vectors) {
      store_grad<T, true>(logits, row, sums, scaled, to);
    } else {
      store_grad<T, false>(logits, row, sums, scaled, to);
    }
  }
}

// ---- kernel launchers

// A block that has a row for itself has no more threads than pieces.
Grid grid_of(LogitRows& logits) {
  if (logits.lanes > kWarp) {
    logits.lanes =
        static_cast<int>(std::min<int64_t>(kMaxThreads, ceil_div(logits.classes, kPiece * kWarp) * kWarp));
    return {logits.rows, logits.lanes};
  }
  return {ceil_div(logits.rows, kThreads / logits.lanes), kThreads};
}

Tensor entropy_fwd(const Tensor& logits, bool normalize) {
  const DeviceGuard guard(logits.get_device_index());
  LogitRows p = logit_rows(logits, normalize);
  Tensor entropy = torch::stable::new_empty(logits, {p.rows}, ScalarType::Float);
  if (p.rows == 0) return entropy;
  with_float_type("logits", logits.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    launch("entropy", logits, grid_of(p), entropy_kernel<T>, p, static_cast<float*>(entropy.data_ptr()));
  });
  return entropy;
}

Tensor entropy_bwd(const Tensor& grad, const Tensor& logits, bool normalize) {
  const DeviceGuard guard(logits.get_device_index());
  LogitRows p = logit_rows(logits, normalize);
  STD_TORCH_CHECK(grad.dim() == 1 && grad.size(0) == p.rows && grad.scalar_type() == ScalarType::Float,
                  "bertops: grad must have an entry for every row, in float32");
  Tensor grad_logits = torch::stable::new_empty(logits, {p.rows, p.classes});
  if (p.rows == 0) return grad_logits;
  with_float_type("logits", logits.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    launch("entropy", logits, grid_of(p), entropy_grad_kernel<T>, p,
           static_cast<const float*>(grad.data_ptr()), grad.stride(0),
           static_cast<T*>(grad_logits.data_ptr()));
  });
  return grad_logits;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bertops, CUDA, m) {
  m.impl("entropy_fwd", TORCH_BOX(&entropy_fwd));
  m.impl("entropy_bwd", TORCH_BOX(&entropy_bwd));
}

}  // namespace bertops
