// 4-bit rows on CUDA: byte j has channels 2 j and 2 j + 1, the lower one in its low four bits.
//
//   Q K^T  A lane reads 8 consecutive bytes of a key for every 64 channels. A word of them is one
//          k-step: its low halves of bytes are one operand word, its high ones the other.
//   P V    A lane reads the same channels of 4 tokens; codes of two tokens in one word are four
//          channels' operands, two after the other: of a byte its lower code and the byte itself,
//          which spares a shift.
//
// Lanes whose channels are beyond the row read other ones of it: they meet zeros of the query, or
// become channels that are not written.
#pragma once

#include "common/cuda/ptx.cuh"
#include "common/cuda/row.cuh"
#include "formats/int4.h"

namespace kvquant::cuda {

template <>
struct LaneCodes<Int4> {
  // code(i), in the low half, of kCount channels (2, 4, 8 or 16) from `channel` on, in one access.
  template <int kCount, class Code>
  static __device__ __forceinline__ void store(uint8_t* row, int channel, Code&& code) {
    constexpr int kBytes = kCount / 2;
    if constexpr (kCount == kLaneChannels) {
      uint32_t words[kBytes / 4];
#pragma unroll
      for (int i = 0; i < kBytes / 4; ++i) {
        const auto bytes = [&](int c) {  // two, in the low bytes of halves
          const uint32_t even = __byte_perm(code(c), code(c + 2), 0x5410),
                         odd = __byte_perm(code(c + 1), code(c + 3), 0x5410);
          return even + (odd << 4);
        };
        words[i] = __byte_perm(bytes(8 * i), bytes(8 * i + 4), 0x6420);
      }
      store_vector<kBytes / 4>(reinterpret_cast<uint32_t*>(row + channel / 2), words);
    } else {
      uint8_t bytes[kBytes];
#pragma unroll
      for (int i = 0; i < kBytes; ++i) {
        bytes[i] = uint8_t((code(2 * i) & 0xfu) | (code(2 * i + 1) & 0xfu) << 4);
      }
      store_vector<kBytes>(row + channel / 2, bytes);
    }
  }
  using Word = uint2;  // kLaneChannels codes as they are stored
  static __device__ __forceinline__ Word ask(const uint8_t* row, int channel) {
    return *reinterpret_cast<const Word*>(row + channel / 2);
  }
  static __device__ __forceinline__ uint4 bytes(Word word) {
    const auto low = [](uint32_t u) { return u & 0x0f0f0f0fu; };
    const auto eight = [&](uint32_t u) {
      const uint32_t even = low(u), odd = low(u >> 4);
      return make_uint2(__byte_perm(even, odd, 0x5140), __byte_perm(even, odd, 0x7362));
    };
    const uint2 a = eight(word.x), b = eight(word.y);
    return make_uint4(a.x, a.y, b.x, b.y);
  }
  static __device__ __forceinline__ void decode(Word word, float (&codes)[kLaneChannels]) {
#pragma unroll
    for (int i = 0; i < kLaneChannels; ++i) {
      codes[i] = float((i < 8 ? word.x : word.y) >> (i % 8 * 4) & 0xfu);
    }
  }
  static __device__ __forceinline__ void load(const uint8_t* row, int channel,
                                              float (&codes)[kLaneChannels]) {
    decode(ask(row, channel), codes);
  }
};

template <int kDim>
struct KeyTile<Int4, kDim, 1> {
  static constexpr int kMostColumns = 1, kColumns = 1;
  TileParams<Int4> params;
  uint2 codes[2][kDim / 64];  // of the lane's token j: channels 64 s + 16 t ...

  static __device__ __forceinline__ constexpr int column(int) { return 0; }
  static __device__ __forceinline__ int first_byte(int head_dim, int, int t) {
    return min(t * 8, head_dim / 2 - 8);
  }
  template <bool kShared>
  __device__ __forceinline__ void load_row(int j, const uint8_t* first, int head_dim, int g,
                                           int t) {
#pragma unroll
    for (int s = 0; s < kDim / 64; ++s) {
      const int step = min(s * 32 + t * 8, head_dim / 2 - 8) - first_byte(head_dim, g, t);
      codes[j][s] = load_piece<uint2, kShared>(first + step);
    }
  }
  __device__ __forceinline__ uint2 operands(int j, int step) const {
    const uint32_t word = step % 2 ? codes[j][step / 2].y : codes[j][step / 2].x;
    return make_uint2(word & 0x0f0f0f0fu, word >> 4 & 0x0f0f0f0fu);
  }
  static __device__ __forceinline__ OperandPlace place(int c) {
    return {c / 64 * 2 + c % 16 / 8, c % 64 / 16, c % 2 * 4 + c % 8 / 2};
  }
  static constexpr bool kInOrder = false;
  static __device__ __forceinline__ int channel(int step, int t) {
    return step / 2 * 64 + t * 16 + step % 2 * 8;
  }
  static __device__ __forceinline__ uint2 in_order(const uint2& x) {
    return make_uint2(__byte_perm(x.x, x.y, 0x6420), __byte_perm(x.x, x.y, 0x7531));
  }
  static __device__ __forceinline__ uint4 in_order(const uint4& x) {
    return make_uint4(__byte_perm(x.x, x.y, 0x5410), __byte_perm(x.z, x.w, 0x5410),
                      __byte_perm(x.x, x.y, 0x7632), __byte_perm(x.z, x.w, 0x7632));
  }
};

template <int kDim>
struct ValueTile<Int4, kDim> {
  TileParams<Int4> params;
  uint32_t codes[4][kDim / 64];  // of token 4 t + i: eight channels from channel(2 n, g) on

  static __device__ __forceinline__ int first_byte(int head_dim, int g) {
    return min(g * kFirstPiece, head_dim / 2 - kFirstPiece);
  }
  template <bool kShared>
  __device__ __forceinline__ void load_row(int i, const uint8_t* first, int head_dim, int g) {
    const auto step = [&](int at, int bytes) {
      return min(at, head_dim / 2 - bytes) - first_byte(head_dim, g);
    };
#pragma unroll
    for (int s = 0; s < kWide; ++s) {
      const auto u = load_piece<uint2, kShared>(first + step(s * 64 + g * 8, 8));
      codes[i][2 * s] = u.x, codes[i][2 * s + 1] = u.y;
    }
    if constexpr (kDim % 128 != 0) {
      codes[i][2 * kWide] = load_piece<uint32_t, kShared>(first + step(kWide * 64 + g * 4, 4));
    }
  }
  // As code - middle, or as code 2^-24. Every second channel's operand is its byte, 16 of its code
  // + the code of the channel before: part() parts them.
  static __device__ __forceinline__ constexpr float middle(bool second) {
    return second ? 17 * Int4::kMiddleCode : Int4::kMiddleCode;
  }
  template <bool kCentered, class F>
  __device__ __forceinline__ void for_operands(F&& f) const {
#pragma unroll
    for (int w = 0; w < kDim / 32; ++w) {
      const auto pair = [&](int i) {
        return __byte_perm(codes[i][w / 2], codes[i + 1][w / 2], w % 2 ? 0x7632 : 0x5410);
      };
      const auto code = [](uint32_t tokens) {
        const uint32_t x = tokens & 0x000f000fu;
        return kCentered ? sub_halves(x | 0x64006400u, 0x64086408u) : x;
      };
      const auto byte = [](uint32_t tokens) {
        const uint32_t x = tokens & 0x00ff00ffu;
        return kCentered ? sub_halves(x | 0x64006400u, 0x64886488u) : x;
      };
      const uint32_t a = pair(0), b = pair(2), c = a >> 8, d = b >> 8;
      f(w, make_uint4(code(a), byte(a), code(b), byte(b)),
        make_uint4(code(c), byte(c), code(d), byte(d)));
    }
  }
  static __device__ __forceinline__ int channel(int w, int g) {
    return w < kWide * 4 ? (w / 4) * 128 + g * 16 + (w % 4) * 4
                         : kWide * 128 + g * 8 + (w - kWide * 4) * 4;
  }
  static __device__ __forceinline__ void part(float (&sums)[4]) {
#pragma unroll
    for (int q = 0; q < 2; ++q) sums[q + 2] = (sums[q + 2] - sums[q]) * 0.0625f;
  }

 private:
  static constexpr int kWide = kDim / 128;                // 8-byte pieces of a row
  static constexpr int kFirstPiece = kDim < 128 ? 4 : 8;  // bytes of the first one
};

}  // namespace kvquant::cuda
