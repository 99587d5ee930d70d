// How an append is cut into items of work: one head's rows of one group of tokens that share a
// mean, so that an item takes the means that begin in it by itself and none waits for another.
#pragma once

#include "common/host_device.h"
#include "params.h"

namespace kvquant {

constexpr int kChunkTokens = 256;  // of an item where the format has no mean

// CUDA: rows of a sequence from which it is the memory's rate that counts, and what an append of so
// many takes for the means that its blocks leave for one another.
constexpr int kManyRows = 64;
constexpr int64_t kAppendFloats = 1 << 20;
KVQUANT_HD int64_t append_floats(int tokens) { return tokens >= kManyRows ? kAppendFloats : 0; }

KVQUANT_HD int chunk_tokens(const CacheView& cache) {
  return cache.mean_group ? cache.mean_group : kChunkTokens;
}
// Items of a sequence and head, however the call's rows lie in their chunks.
KVQUANT_HD int chunks_of(const CacheView& cache, int tokens) {
  const int chunk = chunk_tokens(cache);
  return int((int64_t(tokens) + chunk - 2) / chunk) + 1;
}

// Tokens [begin, end) of the call's own, behind `length` others, in the chunk that starts at
// `start`.
struct Chunk {
  int start, begin, end;
};
KVQUANT_HD Chunk chunk_of(const CacheView& cache, int length, int count, int item) {
  const int chunk = chunk_tokens(cache), start = (length / chunk + item) * chunk;
  return {start, most(start, length), start + least(chunk, length + count - start)};
}

}  // namespace kvquant
