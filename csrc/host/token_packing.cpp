// Packing of whole lines into blocks. Blocks tile the corpus: block b is tokens [offsets[b], offsets[b + 1]), to
// which <s>, </s> and separators are added when a batch is gathered.
#include <algorithm>
#include <vector>

#include "host/arrays.h"

namespace bertops {
namespace {

py::array_t<int64_t> block_offsets(const Input<int64_t>& line_offsets, const Input<int64_t>& document_offsets,
                                   int64_t length, bool separate_lines, bool within_documents) {
  const int64_t *line = line_offsets.data(), *document = document_offsets.data();
  const int64_t documents = document_offsets.size() - 1;
  const int64_t after_line = separate_lines ? 1 : 0;
  const int64_t empty = separate_lines ? 1 : 2;      // <s>, and the one </s> of a block whose lines have none
  const int64_t most = length - empty - after_line;  // tokens of one line that fit a block of their own
  std::vector<int64_t> offsets{0};
  {
    py::gil_scoped_release release;
    int64_t size = empty;  // of the block that is being filled
    const auto close = [&](int64_t token) {
      offsets.push_back(token);
      size = empty;
    };
    for (int64_t d = 0; d < documents; ++d) {
      for (int64_t l = document[d]; l < document[d + 1]; ++l) {
        int64_t start = line[l], tokens = line[l + 1] - start;
        const int64_t before = l == document[d] && size > empty ? 1 : 0;  // between documents of one block
        if (size > empty && size + before + tokens + after_line > length) {
          close(start);
        } else {
          size += before;
        }
        for (; tokens > most; tokens -= most) close(start += most);
        size += tokens + after_line;
      }
      if (within_documents && size > empty) close(line[document[d + 1]]);
    }
    if (size > empty) close(line[document[documents]]);
  }
  return py::array_t<int64_t>(static_cast<int64_t>(offsets.size()), offsets.data());
}

// One block after the other; `put` takes each token.
struct Layout {
  const int32_t* tokens;
  const int64_t *line, *document, *block;
  int64_t lines, documents;
  bool separate_lines;

  // Calls copy(first, count) for runs of tokens and separate() where a separator stands.
  template <typename Copy, typename Separate>
  void walk(int64_t b, Copy copy, Separate separate) const {
    int64_t at = block[b];
    const int64_t end = block[b + 1];
    int64_t l = std::upper_bound(line, line + lines + 1, at) - line - 1;
    int64_t d = std::upper_bound(document, document + documents + 1, l) - document - 1;
    while (at < end) {
      const int64_t document_end = line[document[d + 1]];
      if (!separate_lines) {
        const int64_t stop = std::min(end, document_end);
        copy(at, stop - at);
        separate();
        at = stop;
      } else {
        const int64_t stop = std::min(end, line[l + 1]);
        copy(at, stop - at);
        separate();
        at = stop;
        ++l;
        if (at == document_end && at < end) separate();
      }
      if (at == document_end) ++d;
    }
  }
};

// (ids, cu_seqlens (rows + 1)): ids (T,), or (rows, padded_length) where that is not 0.
py::tuple gather_blocks(const Input<int32_t>& tokens, const Input<int64_t>& line_offsets,
                        const Input<int64_t>& document_offsets, const Input<int64_t>& offsets,
                        const Input<int64_t>& indices, bool separate_lines, int64_t bos, int64_t sep,
                        int64_t pad, int64_t padded_length) {
  const Layout layout{tokens.data(),  line_offsets.data(),     document_offsets.data(),
                      offsets.data(), line_offsets.size() - 1, document_offsets.size() - 1,
                      separate_lines};
  const int64_t rows = indices.size(), *index = indices.data();
  py::array_t<int32_t> cu_seqlens(rows + 1);
  int32_t* cu = cu_seqlens.mutable_data();
  cu[0] = 0;
  for (int64_t r = 0; r < rows; ++r) {
    int64_t size = 1;
    layout.walk(index[r], [&](int64_t, int64_t count) { size += count; }, [&] { ++size; });
    cu[r + 1] = cu[r] + static_cast<int32_t>(size);
  }
  py::array_t<int64_t> ids(padded_length ? rows * padded_length : cu[rows]);
  int64_t* out = ids.mutable_data();
  {
    py::gil_scoped_release release;
    for (int64_t r = 0; r < rows; ++r) {
      int64_t* row = out + (padded_length ? r * padded_length : cu[r]);
      int64_t* to = row;
      *to++ = bos;
      layout.walk(
          index[r],
          [&](int64_t first, int64_t count) {
            to = std::copy(layout.tokens + first, layout.tokens + first + count, to);
          },
          [&] { *to++ = sep; });
      if (padded_length) std::fill(to, row + padded_length, pad);
    }
  }
  return py::make_tuple(ids, cu_seqlens);
}

}  // namespace

void define_token_packing(py::module_& module) {
  module.def("block_offsets", &block_offsets, py::arg("line_offsets"), py::arg("document_offsets"),
             py::arg("length"), py::arg("separate_lines"), py::arg("within_documents"));
  module.def("gather_blocks", &gather_blocks, py::arg("tokens"), py::arg("line_offsets"),
             py::arg("document_offsets"), py::arg("offsets"), py::arg("indices"), py::arg("separate_lines"),
             py::arg("bos"), py::arg("sep"), py::arg("pad"), py::arg("padded_length"));
}

}  // namespace bertops
