// KL between two models' predictions of a vocabulary: what linear_kl_div.cpp hands to linear_kl_div_loops.h.
#pragma once

#include "cpu/linear_loss.h"

namespace bertops {

// Memory in the type of the computation.
struct LinearKL {
  Linear student, teacher;
  double temperature;
  void* rows;        // (M,)
  Matrix grad_rows;  // (M,); no data: no gradients
  LinearGrads grads;
  void *columns_s, *columns_t;  // tokens as columns of panels
  void* rows_s;                 // the student's tokens as rows of panels
  void *logits_s,
      *logits_t;  // (blocks, padded(V), kQueryBlock): logits / T in units of log 2, then exponentials
  void* tops;     // (tasks over V, 2, tokens): the largest of both models
  void* factors;  // (3, tokens): see GradRows
  void* sums;     // (tokens, width up to a panel)
};

}  // namespace bertops
