// Entropy and likeliest class of the rows of a batch.
#pragma once

#include <cstdint>

#include "cpu/dtypes.h"
#include "cpu/tasks.h"

namespace bertops {

struct EntropyRows {
  const void* logits;  // (rows, classes); strides in elements
  DType dtype;
  int64_t rows, classes, row_stride, stride;
  double unit;                    // of the entropy in 1 / nats
  bool bounded;                   // uncertainties, from 0 to the largest entropy
  void* entropy = nullptr;        // (rows,) in the compute type
  int64_t* prediction = nullptr;  // (rows,)
  const void* grad = nullptr;     // of the entropy, in the compute type
  int64_t grad_stride = 0;
  void* grad_logits = nullptr;  // (rows, classes), dense, in the dtype of the logits

  EntropyRows(const Tensor& logits, bool normalize, bool bounded);

  double largest() const;
};

// Fills entropy and, unless null, prediction; or grad_logits where that is given.
void entropy_rows(const EntropyRows& p);

}  // namespace bertops
