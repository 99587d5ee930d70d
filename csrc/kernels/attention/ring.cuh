// A warp's ring of tiles in shared memory: 16 tokens' keys, values and params a stage, copied in
// the background while earlier stages are worked on. A warp fills and reads its own ring only, so
// no block-wide barrier is in the loop.
//
// Rows lie as they come, but their 16-byte chunks change places within 128 bytes so that eight
// lanes never meet a bank twice: keys are read two neighbouring rows x four chunks at a time,
// values four rows that are four apart x two chunks.
#pragma once

#include "kernels/attention/query.cuh"

namespace kvquant::cuda {

template <int kDim>
struct Stage {
  static constexpr int kChunks = kDim / 16;  // of a row
  uint4 k[kTile * kChunks];
  uint4 v[kTile * kChunks];
  uint4 k_params[kTile / 4];
  uint4 v_params[kTile / 4];
  uint4 mean[kDim / 8];  // fp16

  __device__ static int k_place(int row, int chunk) {
    const int swap = kDim % 128 == 0 ? (row & 1) << 2 : 0;  // else two rows' chunks differ already
    return (row * kChunks + chunk) ^ swap;
  }
  __device__ static int v_place(int row, int chunk) {
    return (row * kChunks + chunk) ^ ((row >> 2) << 1);
  }

  // Keys of a lane: channels 64 s + 16 t ... of token 4 (g >> 1) + (g & 1) + 2 j.
  __device__ __forceinline__ uint4 keys(int j, int s, int g, int t) const {
    return k[k_place(4 * (g >> 1) + (g & 1) + 2 * j, 4 * s + t)];
  }
  // Four value channels of token 4 t + i: word w, see value_channel.
  template <int kWords>
  __device__ __forceinline__ void values(int i, int g, int t, uint32_t (&word)[kWords]) const {
    constexpr int kWide = kDim / 128;
    const int row = 4 * t + i;
#pragma unroll
    for (int s = 0; s < kWide; ++s) {
      const uint4 u = v[v_place(row, 8 * s + g)];
      word[4 * s] = u.x, word[4 * s + 1] = u.y, word[4 * s + 2] = u.z, word[4 * s + 3] = u.w;
    }
    if constexpr (kDim % 128 != 0) {
      const uint4* chunk = &v[v_place(row, 8 * kWide + (g >> 1))];
      const uint2 u = reinterpret_cast<const uint2*>(chunk)[g & 1];
      word[4 * kWide] = u.x, word[4 * kWide + 1] = u.y;
    }
  }
};

// First value channel of word w of a lane.
template <int kDim>
__device__ __forceinline__ int value_channel(int w, int g) {
  constexpr int kWide = kDim / 128;
  return w < kWide * 4 ? (w / 4) * 128 + g * 16 + (w % 4) * 4
                       : kWide * 128 + g * 8 + (w - kWide * 4) * 4;
}

// Copies one tile's rows into a stage.
template <int kDim>
__device__ __forceinline__ void fill_stage(Stage<kDim>& stage, const CacheView& cache, int head,
                                           int block, int row, const __half* mean) {
  constexpr int kChunks = Stage<kDim>::kChunks;
  const int lane = threadIdx.x & 31;
  const uint8_t* k = rows_of<uint8_t>(cache.k_data, block, head) + int64_t(row) * cache.k_dim;
  const uint8_t* v = rows_of<uint8_t>(cache.v_data, block, head) + int64_t(row) * cache.v_dim;
#pragma unroll
  for (int i = 0; i < kTile * kChunks / 32; ++i) {
    const int r = (i * 32 + lane) / kChunks, c = (i * 32 + lane) % kChunks;
    const bool there = c * 16 < cache.k_dim;
    copy16_async(&stage.k[stage.k_place(r, c)], k + (there ? r * cache.k_dim + c * 16 : 0), there);
  }
#pragma unroll
  for (int i = 0; i < kTile * kChunks / 32; ++i) {
    const int r = (i * 32 + lane) / kChunks, c = (i * 32 + lane) % kChunks;
    const bool there = c * 16 < cache.v_dim;
    copy16_async(&stage.v[stage.v_place(r, c)], v + (there ? r * cache.v_dim + c * 16 : 0), there);
  }
  if (lane < 8) {
    const Slab& slab = lane < 4 ? cache.k_params : cache.v_params;
    const uint8_t* params = rows_of<uint8_t>(slab, block, head) + int64_t(row) * 4;
    copy16_async(&stage.k_params[lane], params + (lane & 3) * 16, true);  // v_params lie behind
  }
  if (cache.group && lane < kDim / 8) {
    const bool there = mean && lane * 8 < cache.k_dim;
    const void* from = k;  // any address, where there is nothing to copy
    if (there) from = mean + lane * 8;
    copy16_async(&stage.mean[lane], from, there);
  }
}

}  // namespace kvquant::cuda
