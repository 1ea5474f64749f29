// bertops._host: token streams as numpy arrays, without torch.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "host/arrays.h"

namespace bertops {
namespace {

// Where the real tokens of a padded (B, N) batch stand, in row order: their flat indices (T,), their positions
// counted over real tokens (T,), and the offset of every row, cu_seqlens (B + 1,).
py::tuple unpad(const Input<bool>& mask) {
  if (mask.ndim() != 2)
    throw std::invalid_argument("mask must have shape (B, N), got rank " + std::to_string(mask.ndim()));
  const int64_t batch = mask.shape(0), length = mask.shape(1);
  const bool* real = mask.data();
  const int64_t tokens = std::count(real, real + batch * length, true);
  py::array_t<int64_t> indices(tokens), position_ids(tokens);
  py::array_t<int32_t> cu_seqlens(batch + 1);
  int64_t* index = indices.mutable_data();
  int64_t* position = position_ids.mutable_data();
  int32_t* offset = cu_seqlens.mutable_data();
  int64_t written = 0;
  offset[0] = 0;
  for (int64_t row = 0; row < batch; ++row) {
    const int64_t start = written;
    for (int64_t column = 0; column < length; ++column) {
      if (!real[row * length + column]) continue;
      index[written] = row * length + column;
      position[written] = written - start;
      ++written;
    }
    offset[row + 1] = static_cast<int32_t>(written);
  }
  return py::make_tuple(indices, position_ids, cu_seqlens);
}

}  // namespace
}  // namespace bertops

PYBIND11_MODULE(_host, module) {
  module.doc() =
      "Host side of the data path: packing, masking and pairing of token streams over numpy arrays.";
  module.def("unpad", &bertops::unpad, pybind11::arg("mask"));
  bertops::define_masking(module);
  bertops::define_token_packing(module);
  bertops::define_segment_pairs(module);
}
