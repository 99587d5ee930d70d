// 4-bit rows on CUDA: two channels in a byte, in their order.
//
// Append and gather take them. For attention there are no KeyTile and ValueTile yet:
// formats/pairs.def says so, and the choice of a kernel refuses the pair by name.
#pragma once

#include "common/cuda/row.cuh"
#include "formats/int4.h"

namespace kvquant::cuda {

struct NibbleCodes {
  // code(i), in the low bits, of kCount channels (2, 4 or 16) from `channel` on, in one access.
  template <int kCount, class Code>
  static __device__ __forceinline__ void store(uint8_t* row, int channel, Code&& code) {
    uint8_t* const to = row + channel / 2;
    uint32_t words[(kCount + 7) / 8] = {};
#pragma unroll
    for (int i = 0; i < kCount; ++i) words[i / 8] |= (code(i) & 15u) << (4 * (i % 8));
    if constexpr (kCount == 2) {
      *to = uint8_t(words[0]);
    } else if constexpr (kCount == 4) {
      *reinterpret_cast<uint16_t*>(to) = uint16_t(words[0]);
    } else {
      static_assert(kCount == 16);
      *reinterpret_cast<uint2*>(to) = make_uint2(words[0], words[1]);
    }
  }
  static __device__ __forceinline__ void load(const uint8_t* row, int channel,
                                              float (&codes)[kLaneChannels]) {
    const auto words = *reinterpret_cast<const uint2*>(row + channel / 2);
#pragma unroll
    for (int i = 0; i < kLaneChannels; ++i) {  // 2^23 + code, less 2^23
      const uint32_t nibble = (i < 8 ? words.x : words.y) >> (4 * (i % 8)) & 15u;
      codes[i] = __uint_as_float(nibble | 0x4b000000u) - 8388608.f;
    }
  }
};

template <>
struct LaneCodes<Int4> : NibbleCodes {};

}  // namespace kvquant::cuda
