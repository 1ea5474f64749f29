// Squared error of projected hidden states: what projected_mse.cpp hands to projected_mse_loops.h.
#pragma once

#include "cpu/linear_loss.h"

namespace bertops {

// Memory in the type of the computation.
struct ProjectedMSE {
  Linear student;    // without a projection the hidden states and their width alone
  Matrix hidden_t;   // (M, outputs)
  void* rows;        // (M,)
  Matrix grad_rows;  // (M,); no data: no gradients
  LinearGrads grads;
  void* columns;      // tokens as columns of panels
  void* token_rows;   // and as rows of panels
  void* differences;  // (blocks, padded(outputs), kQueryBlock)
  void* squares;      // (tasks over outputs, tokens): their sums
  void* factors;      // (tokens,): twice the upstream gradient
  void* sums;         // (tokens, width up to a panel)
};

}  // namespace bertops
