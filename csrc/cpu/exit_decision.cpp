// Which rows of a batch are certain enough, and the order that moves the others together.
#include <tuple>

#include "cpu/entropy.h"

namespace bertops {
namespace {

// exited[i] = uncertainty[i] <= threshold, which NaN is not; rows that stay come first in `order`. How many stay.
template <class T>
int64_t partition(const T* uncertainty, T threshold, int64_t rows, bool* exited, int64_t* order) {
  int64_t exits = 0;
  for (int64_t row = 0; row < rows; ++row) {
    exited[row] = uncertainty[row] <= threshold;
    exits += exited[row];
  }
  int64_t kept = 0, gone = rows - exits;
  for (int64_t row = 0; row < rows; ++row) order[exited[row] ? gone++ : kept++] = row;
  return kept;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> exit_decision(const Tensor& logits, double threshold,
                                                                 bool normalize) {
  EntropyRows p(logits, normalize, true);
  const ScalarType accumulator = accumulator_dtype(logits.scalar_type());
  Tensor prediction = torch::stable::new_empty(logits, {p.rows}, ScalarType::Long);
  Tensor uncertainty = torch::stable::new_empty(logits, {p.rows}, accumulator);
  Tensor exited = torch::stable::new_empty(logits, {p.rows}, ScalarType::Bool);
  Tensor order = torch::stable::new_empty(logits, {p.rows}, ScalarType::Long);
  Tensor num_kept = torch::stable::new_empty(logits, {}, ScalarType::Long);
  p.entropy = uncertainty.data_ptr();
  p.prediction = static_cast<int64_t*>(prediction.data_ptr());
  entropy_rows(p);
  bool* gone = static_cast<bool*>(exited.data_ptr());
  int64_t* places = static_cast<int64_t*>(order.data_ptr());
  int64_t* kept = static_cast<int64_t*>(num_kept.data_ptr());
  if (accumulator == ScalarType::Double) {
    *kept = partition(static_cast<const double*>(p.entropy), threshold, p.rows, gone, places);
  } else {
    *kept =
        partition(static_cast<const float*>(p.entropy), static_cast<float>(threshold), p.rows, gone, places);
  }
  return {prediction, uncertainty, exited, order, num_kept};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bertops, CPU, m) { m.impl("exit_decision", TORCH_BOX(&exit_decision)); }

}  // namespace bertops
