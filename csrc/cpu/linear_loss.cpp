// The tensor side that the losses behind a linear layer share.
#include "cpu/linear_loss.h"

#include <cstring>

namespace bertops {

Linear::Linear(const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias)
    : hidden(hidden), weight(weight), bias(bias), width(hidden.size(1)), outputs(weight.size(0)) {
  STD_TORCH_CHECK(hidden.dim() == 2 && weight.dim() == 2 && weight.size(1) == width,
                  "bertops: hidden states must be (M, width) and weights (outputs, width)");
  STD_TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == outputs),
                  "bertops: a bias must have an entry for every output");
}

Workspace::Workspace(int64_t bytes) {
  constexpr int64_t kHugePage = int64_t{2} << 20;
  const int64_t size = rounded(bytes, bytes < kHugePage ? 64 : kHugePage);
  memory_.reset(std::aligned_alloc(bytes < kHugePage ? 64 : kHugePage, size));
  if (memory_ == nullptr) throw std::bad_alloc();
#ifdef __linux__
  if (bytes >= kHugePage) madvise(memory_.get(), size, MADV_HUGEPAGE);
#endif
  next_ = static_cast<char*>(memory_.get());
}

std::vector<int64_t> real_tokens(int64_t rows, const std::optional<Tensor>& mask) {
  std::vector<int64_t> tokens;
  tokens.reserve(rows);
  if (mask) {
    STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool && mask->dim() == 1 && mask->size(0) == rows,
                    "bertops: mask must be bool with an entry for every row");
  }
  const bool* real = mask ? static_cast<const bool*>(mask->data_ptr()) : nullptr;
  const int64_t stride = mask ? mask->stride(0) : 0;
  for (int64_t row = 0; row < rows; ++row) {
    if (real == nullptr || real[row * stride]) tokens.push_back(row);
  }
  return tokens;
}

int64_t chunk_tokens(int64_t tokens, int64_t bytes_of_token, int64_t bytes_at_most) {
  const int64_t fit = bytes_at_most / bytes_of_token / kQueryBlock * kQueryBlock;
  const int64_t most = std::max(kQueryBlock, std::min(kChunkTokens, fit));
  const int64_t chunks = std::max<int64_t>(1, (tokens + most - 1) / most);
  return rounded((tokens + chunks - 1) / chunks, kQueryBlock);
}

void clear_rest(const Linear& student, const std::vector<int64_t>& tokens, const Tensor& rows,
                const LinearGrads& grads) {
  const int64_t count = static_cast<int64_t>(tokens.size()), all = rows.size(0);
  const int64_t size = rows.element_size();
  if (count < all) {
    std::memset(rows.data_ptr(), 0, all * size);
    if (grads.hidden != nullptr) std::memset(grads.hidden, 0, all * student.width * size);
  }
  if (count > 0) return;
  if (grads.weight != nullptr) std::memset(grads.weight, 0, student.outputs * student.width * size);
  if (grads.bias != nullptr) std::memset(grads.bias, 0, student.outputs * size);
}

namespace {

Tensor grad_of(const Tensor& hidden, const std::optional<Tensor>& x, bool wanted) {
  const ScalarType dtype = accumulator_dtype(hidden.scalar_type());
  STD_TORCH_CHECK(x || !wanted, "bertops: what is not given has no gradient");
  if (!wanted) return torch::stable::new_empty(hidden, {0}, dtype);
  std::vector<int64_t> sizes;
  for (int64_t d = 0; d < x->dim(); ++d) sizes.push_back(x->size(d));
  Tensor grad = torch::stable::new_empty(hidden, sizes, dtype);
  prefer_huge_pages(grad);
  return grad;
}

}  // namespace

GradTensors::GradTensors(const Tensor& hidden, const std::optional<Tensor>& weight,
                         const std::optional<Tensor>& bias, bool want_hidden, bool want_weight,
                         bool want_bias)
    : hidden(grad_of(hidden, hidden, want_hidden)),
      weight(grad_of(hidden, weight, want_weight)),
      bias(grad_of(hidden, bias, want_bias)) {
  if (want_hidden) grads.hidden = this->hidden.data_ptr();
  if (want_weight) grads.weight = this->weight.data_ptr();
  if (want_bias) grads.bias = this->bias.data_ptr();
}

}  // namespace bertops
