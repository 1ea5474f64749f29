// Masked-language-model masking of whole batches: the words or tokens to predict, drawn anew for every epoch.
#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "host/arrays.h"
#include "host/draws.h"

namespace bertops {
namespace {

constexpr int64_t kIgnored = -100;  // the label of a token that is not predicted
constexpr int64_t kMaxNgram = 10;

struct Units {  // what is masked as a whole: words, or single tokens; within one sequence
  std::vector<int32_t> begin, end;
  int64_t count = 0, tokens = 0;

  void reserve(int64_t length) {
    if (static_cast<int64_t>(begin.size()) < length) {
      begin.resize(length);
      end.resize(length);
    }
  }
};

// Rates are fixed-point, times 2^32.
class Masker {
 public:
  Masker(int64_t mask_token_id, const Input<bool>& special, const Input<bool>& word_starts, uint64_t seed,
         uint64_t mask_rate, uint64_t mask_replace_rate, uint64_t random_replace_rate, bool mask_special,
         int64_t ngram, int64_t max_predictions)
      : special_(special.data(), special.data() + special.size()),
        starts_(word_starts.data(), word_starts.data() + word_starts.size()),
        mask_token_id_(mask_token_id),
        seed_(seed),
        mask_rate_(mask_rate),
        mask_below_(mask_replace_rate),
        random_below_(mask_replace_rate + random_replace_rate),
        mask_special_(mask_special),
        ngram_(ngram),
        max_predictions_(max_predictions) {
    for (int64_t id = 0; id < vocab_size(); ++id)
      if (!special_[id]) replacements_.push_back(static_cast<int32_t>(id));
    int64_t multiple = 1;
    for (int64_t n = 1; n <= ngram; ++n) multiple = std::lcm(multiple, n);
    weight_.push_back(0);
    total_.push_back(0);
    for (int64_t n = 1; n <= ngram; ++n) {
      weight_.push_back(multiple / n);
      total_.push_back(total_.back() + weight_.back());
    }
  }

  // ids, real: (T,), the rows one after the other; offsets (rows + 1,); indices (rows,). Writes into ids.
  py::array_t<int64_t> mask(py::array_t<int64_t, py::array::c_style> ids, const py::object& real_or_none,
                            const Input<int64_t>& offsets, const Input<int64_t>& indices,
                            uint32_t epoch) const {
    Input<bool> real_array = real_or_none.is_none() ? Input<bool>(0) : real_or_none.cast<Input<bool>>();
    const bool* real = real_or_none.is_none() ? nullptr : real_array.data();
    py::array_t<int64_t> labels(ids.size());
    int64_t *id = ids.mutable_data(), *label = labels.mutable_data();
    const int64_t *offset = offsets.data(), *index = indices.data(), rows = indices.size();
    py::gil_scoped_release release;
    Units units;
    std::vector<int32_t> order;
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t first = offset[row], length = offset[row + 1] - first;
      units.reserve(length);
      find_units(id + first, real ? real + first : nullptr, length, row, units);
      std::fill(label + first, label + first + length, kIgnored);
      Draws draws(seed_, Purpose::kMasking, epoch, index[row]);
      mask_row(id + first, label + first, units, draws, order);
    }
    return labels;
  }

 private:
  int64_t vocab_size() const { return static_cast<int64_t>(special_.size()); }

  void find_units(const int64_t* id, const bool* real, int64_t length, int64_t row, Units& units) const {
    int64_t count = 0, tokens = 0;
    const uint64_t vocab = special_.size();
    bool open = false;  // a word that the next token may continue
    for (int64_t i = 0; i < length; ++i) {
      if (real && !real[i]) {
        open = false;
        continue;
      }
      if (static_cast<uint64_t>(id[i]) >= vocab)
        throw std::invalid_argument("input_ids must lie in [0, " + std::to_string(vocab) + "), got " +
                                    std::to_string(id[i]) + " in sequence " + std::to_string(row) +
                                    ", token " + std::to_string(i));
      const bool special = special_[id[i]];
      if (special && !mask_special_) {
        open = false;
        continue;
      }
      ++tokens;
      if (open && !special && !starts_.empty() && !starts_[id[i]]) {
        units.end[count - 1] = static_cast<int32_t>(i + 1);
        continue;
      }
      units.begin[count] = static_cast<int32_t>(i);
      units.end[count++] = static_cast<int32_t>(i + 1);
      open = !special;
    }
    units.count = count;
    units.tokens = tokens;
  }

  // Goes through the units in random order (Fisher-Yates, as far as needed) until enough tokens are masked. An
  // n-gram starts at the unit drawn and stays among neighbours; one that would be too long is shortened.
  void mask_row(int64_t* id, int64_t* label, const Units& units, Draws& draws,
                std::vector<int32_t>& order) const {
    int64_t wanted = static_cast<int64_t>((mask_rate_ * units.tokens + draws.next()) >> 32);
    if (max_predictions_ >= 0) wanted = std::min(wanted, max_predictions_);
    order.resize(units.count);
    std::iota(order.begin(), order.end(), 0);
    int64_t masked = 0;
    for (int64_t i = 0; i < units.count && masked < wanted; ++i) {
      std::swap(order[i], order[i + draws.below(units.count - i)]);
      const int64_t unit = order[i];
      int64_t n = ngram_ > 1 ? draw_ngram(units, unit, draws) : 1;
      const int64_t begin = units.begin[unit];
      while (n > 0 && masked + units.end[unit + n - 1] - begin > wanted) --n;
      if (n == 0) continue;
      const int64_t end = units.end[unit + n - 1];
      if (ngram_ > 1 && std::any_of(label + begin, label + end, [](int64_t x) { return x != kIgnored; }))
        continue;
      for (int64_t j = begin; j < end; ++j) {
        label[j] = id[j];
        id[j] = replacement(id[j], draws);
      }
      masked += end - begin;
    }
  }

  // n with p(n) proportional to 1/n, among the n-grams that start at `unit` without a gap.
  int64_t draw_ngram(const Units& units, int64_t unit, Draws& draws) const {
    int64_t longest = 1;
    while (longest < ngram_ && unit + longest < units.count &&
           units.begin[unit + longest] == units.end[unit + longest - 1])
      ++longest;
    int64_t value = static_cast<int64_t>(draws.below(total_[longest])), n = 1;
    while (value >= weight_[n]) value -= weight_[n++];
    return n;
  }

  int64_t replacement(int64_t id, Draws& draws) const {
    const uint32_t word = draws.next();
    if (word < mask_below_) return mask_token_id_;
    if (word < random_below_) return replacements_[draws.below(replacements_.size())];
    return id;
  }

  std::vector<uint8_t> special_, starts_;
  std::vector<int32_t> replacements_;
  std::vector<int64_t> weight_, total_;  // of n = 0, 1, ... ngram; total_[n] sums the weights up to n
  int64_t mask_token_id_;
  uint64_t seed_, mask_rate_, mask_below_, random_below_;
  bool mask_special_;
  int64_t ngram_, max_predictions_;
};

}  // namespace

void define_masking(py::module_& module) {
  module.attr("MAX_NGRAM") = kMaxNgram;
  module.attr("INDEX_LIMIT") = kIndexLimit;
  py::class_<Masker>(module, "Masker")
      .def(py::init<int64_t, const Input<bool>&, const Input<bool>&, uint64_t, uint64_t, uint64_t, uint64_t,
                    bool, int64_t, int64_t>(),
           py::kw_only(), py::arg("mask_token_id"), py::arg("special"), py::arg("word_starts"),
           py::arg("seed"), py::arg("mask_rate"), py::arg("mask_replace_rate"),
           py::arg("random_replace_rate"), py::arg("mask_special"), py::arg("ngram"),
           py::arg("max_predictions"))
      .def("mask", &Masker::mask, py::arg("ids").noconvert(), py::arg("real"), py::arg("offsets"),
           py::arg("indices"), py::arg("epoch"));
  module.def(
      "draws",
      [](uint64_t seed, uint32_t purpose, uint32_t epoch, int64_t index, int64_t count) {
        Draws draws(seed, static_cast<Purpose>(purpose), epoch, index);
        py::array_t<uint32_t> words(count);
        std::generate_n(words.mutable_data(), count, [&] { return draws.next(); });
        return words;
      },
      py::arg("seed"), py::arg("purpose"), py::arg("epoch"), py::arg("index"), py::arg("count"));
  module.def(
      "permutation",
      [](int64_t count, uint64_t seed, uint32_t epoch) {
        py::array_t<int64_t> result(count);
        int64_t* order = result.mutable_data();
        py::gil_scoped_release release;
        Draws draws(seed, Purpose::kPermutation, epoch, 0);
        std::iota(order, order + count, 0);
        for (int64_t i = 0; i < count; ++i) std::swap(order[i], order[i + draws.below(count - i)]);
        return result;
      },
      py::arg("count"), py::arg("seed"), py::arg("epoch"));
}

}  // namespace bertops
