// Philox4x32-10 (Salmon et al., SC 2011), the source of every dropout mask: a mask is a function of the seed and
// of (sequence, head, query, key) alone, whatever the device and the tiling.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define BERTOPS_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define BERTOPS_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace bertops {

// Replaces the counter in `word` by four random words.
BERTOPS_HOST_DEVICE void philox(uint64_t seed, uint32_t word[4]) {
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t first = 0xD2511F53ull * word[0];
    const uint64_t second = 0xCD9E8D57ull * word[2];
    word[0] = static_cast<uint32_t>(second >> 32) ^ word[1] ^ key0;
    word[1] = static_cast<uint32_t>(second);
    word[2] = static_cast<uint32_t>(first >> 32) ^ word[3] ^ key1;
    word[3] = static_cast<uint32_t>(first);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

}  // namespace bertops
