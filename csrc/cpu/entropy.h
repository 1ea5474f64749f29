// Entropy and likeliest class of the rows of a batch.
#pragma once

#include <cstdint>

#include "cpu/heads.h"
#include "cpu/tasks.h"

namespace bertops {

struct EntropyRows {
  const void* logits;
  DType dtype;
  int64_t rows, classes, row_stride, stride;
  double unit;          // the entropy of a row is given in multiples of 1 / unit nats
  double top;           // largest uncertainty, or infinity for the entropy as it is
  void* entropy;        // (rows,) in the compute type
  int64_t* prediction;  // (rows,) or null

  EntropyRows(const Tensor& logits, bool normalize, bool bounded);
};

// Fills entropy and prediction.
void entropy_rows(const EntropyRows& p);

}  // namespace bertops
