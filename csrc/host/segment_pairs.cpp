// Pairs of segments as the data code of BERT and ALBERT makes them: consecutive ones of a document, whose second one
// may be random (next sentence), or which may be swapped (sentence order).
#include <algorithm>
#include <vector>

#include "host/arrays.h"
#include "host/draws.h"

namespace bertops {
namespace {

struct Span {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

constexpr uint64_t kHalf = uint64_t{1} << 31;  // a rate

class PairMaker {
 public:
  PairMaker(const int64_t* line, const int64_t* document, int64_t documents, int64_t most,
            uint64_t short_rate, bool next_sentence, bool random_segments, uint64_t seed, uint32_t epoch)
      : line_(line),
        document_(document),
        documents_(documents),
        most_(most),
        short_rate_(short_rate),
        next_sentence_(next_sentence),
        random_segments_(random_segments),
        seed_(seed),
        epoch_(epoch) {}

  void add_document(int64_t d) {
    Draws draws(seed_, next_sentence_ ? Purpose::kNextSentence : Purpose::kSentenceOrder, epoch_, d);
    const int64_t last = document_[d + 1], least = random_segments_ ? 1 : 2;
    for (int64_t first = document_[d]; first < last;) {
      int64_t target = most_, end = first + 1;
      if (draws.chance(short_rate_)) target = 2 + static_cast<int64_t>(draws.below(most_ - 1));
      while (end < last && (line_[end] - line_[first] < target || end - first < least)) ++end;
      first = end - first >= least ? add_pair(d, first, end, target, draws) : end;
    }
  }

  std::vector<int64_t> spans;  // (P, 4): begin and end of the first segment, begin and end of the second
  std::vector<int64_t> labels;

 private:
  // Of lines [first, end), cut between two of them; with probability 1/2 the halves are swapped, or lines of another
  // document take the place of the second. One line alone is followed by such lines. Returns the line after those
  // that were taken.
  int64_t add_pair(int64_t d, int64_t first, int64_t end, int64_t target, Draws& draws) {
    const bool alone = end - first == 1;
    int64_t cut = end;
    if (!alone) cut = first + 1 + static_cast<int64_t>(draws.below(end - first - 1));
    const bool changed = alone || draws.chance(kHalf);
    Span a{line_[first], line_[cut]}, b{line_[cut], line_[end]};
    if (alone || (changed && next_sentence_)) {
      b = from_other_document(d, target - a.size(), draws);
      end = cut;
    } else if (changed) {
      std::swap(a, b);
    }
    while (a.size() + b.size() > most_) {
      Span& longer = a.size() > b.size() ? a : b;
      if (draws.chance(kHalf)) {
        ++longer.begin;
      } else {
        --longer.end;
      }
    }
    spans.insert(spans.end(), {a.begin, a.end, b.begin, b.end});
    labels.push_back(changed ? 1 : 0);
    return end;
  }

  Span from_other_document(int64_t d, int64_t wanted, Draws& draws) const {
    int64_t other = static_cast<int64_t>(draws.below(documents_ - 1));
    if (other >= d) ++other;
    const int64_t lines = document_[other + 1] - document_[other];
    const int64_t first = document_[other] + static_cast<int64_t>(draws.below(lines));
    int64_t end = first + 1;
    while (end < document_[other + 1] && line_[end] - line_[first] < wanted) ++end;
    return {line_[first], line_[end]};
  }

  const int64_t *line_, *document_;
  int64_t documents_, most_;
  uint64_t short_rate_;
  bool next_sentence_, random_segments_;
  uint64_t seed_;
  uint32_t epoch_;
};

// (spans (P, 4), labels (P,))
py::tuple segment_pairs(const Input<int64_t>& line_offsets, const Input<int64_t>& document_offsets,
                        int64_t most, uint64_t short_rate, bool next_sentence, bool random_segments,
                        uint64_t seed, uint32_t epoch) {
  const int64_t documents = document_offsets.size() - 1;
  PairMaker maker(line_offsets.data(), document_offsets.data(), documents, most, short_rate, next_sentence,
                  random_segments, seed, epoch);
  {
    py::gil_scoped_release release;
    for (int64_t d = 0; d < documents; ++d) maker.add_document(d);
  }
  const int64_t pairs = static_cast<int64_t>(maker.labels.size());
  py::array_t<int64_t> spans({pairs, int64_t{4}}), labels(pairs);
  std::copy(maker.spans.begin(), maker.spans.end(), spans.mutable_data());
  std::copy(maker.labels.begin(), maker.labels.end(), labels.mutable_data());
  return py::make_tuple(spans, labels);
}

// (ids, token types, cu_seqlens (rows + 1)) of the pairs `spans` (rows, 4): the first two are (T,), or (rows,
// padded_length) where that is not 0.
py::tuple gather_pairs(const Input<int32_t>& tokens, const Input<int64_t>& spans, int64_t cls, int64_t sep,
                       int64_t pad, int64_t padded_length) {
  const int64_t rows = spans.shape(0), *span = spans.data();
  const int32_t* token = tokens.data();
  py::array_t<int32_t> cu_seqlens(rows + 1);
  int32_t* cu = cu_seqlens.mutable_data();
  cu[0] = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t* s = span + 4 * r;
    cu[r + 1] = cu[r] + static_cast<int32_t>(s[1] - s[0] + s[3] - s[2] + 3);
  }
  const int64_t size = padded_length ? rows * padded_length : cu[rows];
  py::array_t<int64_t> ids(size), types(size);
  int64_t *id = ids.mutable_data(), *type = types.mutable_data();
  {
    py::gil_scoped_release release;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t* s = span + 4 * r;
      const int64_t start = padded_length ? r * padded_length : cu[r];
      int64_t* to = id + start;
      *to++ = cls;
      to = std::copy(token + s[0], token + s[1], to);
      *to++ = sep;
      const int64_t second = to - id;
      to = std::copy(token + s[2], token + s[3], to);
      *to++ = sep;
      std::fill(type + start, type + second, 0);
      std::fill(type + second, type + (to - id), 1);
      if (padded_length) {
        std::fill(type + (to - id), type + start + padded_length, 0);
        std::fill(to, id + start + padded_length, pad);
      }
    }
  }
  return py::make_tuple(ids, types, cu_seqlens);
}

}  // namespace

void define_segment_pairs(py::module_& module) {
  module.def("segment_pairs", &segment_pairs, py::arg("line_offsets"), py::arg("document_offsets"),
             py::arg("most"), py::arg("short_rate"), py::arg("next_sentence"), py::arg("random_segments"),
             py::arg("seed"), py::arg("epoch"));
  module.def("gather_pairs", &gather_pairs, py::arg("tokens"), py::arg("spans"), py::arg("cls"),
             py::arg("sep"), py::arg("pad"), py::arg("padded_length"));
}

}  // namespace bertops
