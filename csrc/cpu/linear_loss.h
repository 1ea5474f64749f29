// Losses between a linear layer's outputs and a teacher: what linear_kl_div.cpp and projected_mse.cpp hand to the
// products in linear_loss_loops.h. Rows of hidden states ("tokens") go through in chunks; the outputs of a chunk stand
// in memory as blocks of kQueryBlock tokens, (outputs, kQueryBlock) each, a token in every lane.
#pragma once

#include <memory>
#include <new>
#include <vector>

#include "cpu/tasks.h"

namespace bertops {

// (rows, columns) of any strides, or (rows,); no data where there is none.
struct Matrix {
  void* data = nullptr;
  DType dtype = DType::kFloat;
  int64_t row_stride = 0, stride = 1;

  Matrix() = default;
  explicit Matrix(const Tensor& x)
      : data(x.data_ptr()),
        dtype(dtype_of(x.scalar_type())),
        row_stride(x.dim() > 0 ? x.stride(0) : 0),
        stride(x.dim() > 1 ? x.stride(1) : 1) {}
  explicit Matrix(const std::optional<Tensor>& x) : Matrix(x ? Matrix(*x) : Matrix()) {}
};

struct Linear {
  Matrix hidden;  // (M, width)
  Matrix weight;  // (outputs, width)
  Matrix bias;    // (outputs,) or none
  int64_t width = 0, outputs = 0;

  Linear() = default;
  Linear(const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias);
};

constexpr int64_t kOutputBlock = 128;  // rows of a weight that one task multiplies at a time
constexpr int64_t kSumBlock = 256;     // terms that a product adds up before they join the others
constexpr int64_t kChunkTokens = 512;
constexpr int64_t kPanelPadding = 32;  // a multiple of every kTileVectors * lanes

inline int64_t rounded(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

// Some real tokens on their way through, with their operands packed for the products. Offsets in elements.
struct Chunk {
  const int64_t* token;  // rows of the hidden states
  int64_t count;         // of tokens
  int64_t blocks;        // of kQueryBlock tokens
  bool first;            // of all chunks
};

// The student's gradients (M, width), (outputs, width) and (outputs,), dense, in the type of the computation; null
// where not wanted.
struct LinearGrads {
  void* hidden = nullptr;
  void* weight = nullptr;
  void* bias = nullptr;
};

// Memory on huge pages where the system has them: outputs of a chunk are read along and across.
class Workspace {
 public:
  explicit Workspace(int64_t bytes);
  // The next `elements` of `size` bytes, on a cache line.
  void* take(int64_t elements, int64_t size) {
    void* taken = next_;
    next_ += rounded(elements * size, 64);
    return taken;
  }

 private:
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  std::unique_ptr<void, Free> memory_;
  char* next_;
};

// The rows that a mask leaves, all without one.
std::vector<int64_t> real_tokens(int64_t rows, const std::optional<Tensor>& mask);

// Chunks of about equal size, within kChunkTokens and, but for a block, `bytes_at_most`.
int64_t chunk_tokens(int64_t tokens, int64_t bytes_of_token, int64_t bytes_at_most);

// Units of work over a chunk: kOutputBlock outputs each, of all its tokens where that makes enough tasks.
struct OutputTasks {
  int64_t outputs, groups, blocks;
  OutputTasks(int64_t outputs_, int64_t blocks_, int64_t threads)
      : outputs((outputs_ + kOutputBlock - 1) / kOutputBlock),
        groups(std::min(blocks_, std::max<int64_t>(1, 2 * threads / outputs))),
        blocks(blocks_) {}
  int64_t count() const { return outputs * groups; }
  int64_t block(int64_t task) const { return task / groups; }
  int64_t from(int64_t task) const { return task % groups * blocks / groups; }
  int64_t to(int64_t task) const { return (task % groups + 1) * blocks / groups; }
};

// And over the gradients of its tokens: up to kMostBlocks blocks, and all columns where that makes enough tasks.
struct HiddenTasks {
  static constexpr int64_t kMostBlocks = 4, kColumns = 256;
  int64_t groups, parts, blocks, width;
  HiddenTasks(const LinearGrads& grads, int64_t width_, int64_t blocks_, int64_t threads)
      : groups(std::min(blocks_, std::max((blocks_ + kMostBlocks - 1) / kMostBlocks, threads))),
        parts(groups >= threads ? 1 : (width_ + kColumns - 1) / kColumns),
        blocks(blocks_),
        width(width_) {
    if (grads.hidden == nullptr) groups = 0;
  }
  int64_t count() const { return groups * parts; }
  int64_t from(int64_t task) const { return task / parts * blocks / groups; }
  int64_t to(int64_t task) const { return (task / parts + 1) * blocks / groups; }
  int64_t first(int64_t task) const { return task % parts * kColumns; }
  int64_t last(int64_t task) const { return parts == 1 ? width : std::min(width, first(task) + kColumns); }
};

// Both kinds of gradients: those of the tokens, which take longest, then those of kOutputBlock outputs each.
struct GradTasks {
  HiddenTasks hidden;
  int64_t weights;
  GradTasks(const Linear& student, const LinearGrads& grads, int64_t blocks, int64_t threads)
      : hidden(grads, student.width, blocks, threads),
        weights((student.outputs + kOutputBlock - 1) / kOutputBlock) {
    if (grads.weight == nullptr && grads.bias == nullptr) weights = 0;
  }
  int64_t count() const { return hidden.count() + weights; }
};

// Elements of scratch that a task takes: for packing tokens, for outputs, for gradients.
inline int64_t pack_scratch(int64_t width) { return kPadding * rounded(width, kPanelPadding); }
inline int64_t output_scratch(int64_t width) {
  return kOutputBlock + (width + kSumBlock - 1) / kSumBlock * kOutputBlock * (kSumBlock + kPadding);
}
inline int64_t grad_scratch() {
  const int64_t weights = kOutputBlock * (kChunkTokens + kPadding) + kPadding * kPanelPadding;
  const int64_t hidden =
      HiddenTasks::kMostBlocks * kQueryBlock * kSumBlock + (kSumBlock + 1) * HiddenTasks::kColumns;
  return std::max(weights, hidden);
}

inline Tensor new_loss_rows(const Tensor& hidden) {
  return torch::stable::new_empty(hidden, {hidden.size(0)}, accumulator_dtype(hidden.scalar_type()));
}

// Zeroes the rows of the loss and the gradients that no token of `tokens` writes.
void clear_rest(const Linear& student, const std::vector<int64_t>& tokens, const Tensor& rows,
                const LinearGrads& grads);

// Gradients of the student where wanted, else empty; and their memory.
struct GradTensors {
  Tensor hidden, weight, bias;
  LinearGrads grads;
  GradTensors(const Tensor& hidden, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
              bool want_hidden, bool want_weight, bool want_bias);
};

}  // namespace bertops
