// The random words of one example: a function of (seed, purpose, epoch, index) alone, so that neither the order
// in which examples are made nor the number of workers shows in them.
#pragma once

#include <cstdint>

#include "common/philox.h"

namespace bertops {

// What the words are for; examples of the same index draw differently for each.
enum class Purpose : uint32_t { kMasking = 1, kSentenceOrder = 2, kPermutation = 3, kNextSentence = 4 };

inline constexpr int64_t kIndexLimit = int64_t{1} << 56;  // index takes 56 bits of the counter, the purpose 8

class Draws {
 public:
  Draws(uint64_t seed, Purpose purpose, uint32_t epoch, int64_t index)
      : seed_(seed),
        low_(static_cast<uint32_t>(index)),
        high_(static_cast<uint32_t>(index >> 32) | static_cast<uint32_t>(purpose) << 24),
        epoch_(epoch) {}

  uint32_t next() {
    if (used_ == 4) refill();
    return word_[used_++];
  }

  // Uniform in [0, limit), off by at most limit / 2^32; limit <= 2^32.
  uint64_t below(uint64_t limit) { return next() * limit >> 32; }

  // True with probability `rate` / 2^32.
  bool chance(uint64_t rate) { return next() < rate; }

 private:
  void refill() {
    word_[0] = block_++;
    word_[1] = low_;
    word_[2] = high_;
    word_[3] = epoch_;
    philox(seed_, word_);
    used_ = 0;
  }

  uint64_t seed_;
  uint32_t low_, high_, epoch_;
  uint32_t block_ = 0, word_[4] = {};
  int used_ = 4;
};

}  // namespace bertops
