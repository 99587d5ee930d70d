// 8-bit rows on CUDA: a byte a channel, in their order (Byte..., which any such format may take).
//
//   Q K^T  A lane reads 16 consecutive bytes of a key: with the channels of a k-step permuted alike
//          in A and B, two of its words are one k-step's B fragment as they are. With one column
//          a key, four lanes read 64 bytes of it at once; with two, eight lanes read 128, a whole
//          line, which is half as many requests to L2.
//   P V    A lane reads the same 16 channels of 4 tokens and transposes 4 x 4 bytes with
//          byte-permutes.
//
// Lanes whose channels are beyond the row read other ones of it: they meet zeros of the query, or
// become channels that are not written.
#pragma once

#include "common/cuda/ptx.cuh"
#include "common/cuda/row.cuh"
#include "formats/int8.h"

namespace kvquant::cuda {

struct ByteCodes {
  // code(i), in the low byte, of kCount channels (2, 4, 8 or 16) from `channel` on, in one access.
  template <int kCount, class Code>
  static __device__ __forceinline__ void store(uint8_t* row, int channel, Code&& code) {
    uint8_t* const to = row + channel;
    if constexpr (kCount == 2) {
      *reinterpret_cast<uint16_t*>(to) = uint16_t(__byte_perm(code(0), code(1), 0x0040));
    } else {
      uint32_t words[kCount / 4];
#pragma unroll
      for (int i = 0; i < kCount / 4; ++i) {
        words[i] = pack_bytes(code(4 * i), code(4 * i + 1), code(4 * i + 2), code(4 * i + 3));
      }
      store_vector<kCount / 4>(reinterpret_cast<uint32_t*>(to), words);
    }
  }
  using Word = uint4;  // kLaneChannels codes as they are stored
  static __device__ __forceinline__ Word ask(const uint8_t* row, int channel) {
    return *reinterpret_cast<const Word*>(row + channel);
  }
  static __device__ __forceinline__ uint4 bytes(Word word) { return word; }
  static __device__ __forceinline__ void decode(Word word, float (&codes)[kLaneChannels]) {
    decode16(word, codes);
  }
  static __device__ __forceinline__ void load(const uint8_t* row, int channel,
                                              float (&codes)[kLaneChannels]) {
    decode(ask(row, channel), codes);
  }
};

template <int kDim, int kTokenColumns>
struct ByteKeys {
  static constexpr int kMostColumns = kDim % 128 == 0 ? 2 : 1;
  static constexpr int kColumns = kTokenColumns, kPieces = kDim / 64 / kColumns;
  static_assert(kDim % (64 * kColumns) == 0);
  uint4 codes[2 * kColumns][kPieces];  // of the lane's token j: 16 channels each

  static __device__ __forceinline__ int first_byte(int head_dim, int g, int t) {
    return min(piece(0, g, t), head_dim - 16);
  }
  // `first`: the row's first_byte.
  template <bool kShared>
  __device__ __forceinline__ void load_row(int j, const uint8_t* first, int head_dim, int g,
                                           int t) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int step = min(piece(i, g, t), head_dim - 16) - first_byte(head_dim, g, t);
      codes[j][i] = load_piece<uint4, kShared>(first + step);
    }
  }
  // Two k-steps are 64 channels. Of two columns, the odd one has the second 64 of each 128.
  static __device__ __forceinline__ constexpr int column(int step) { return step / 2 % kColumns; }
  __device__ __forceinline__ uint2 operands(int j, int step) const {
    const uint4& u = codes[j][step / 2 / kColumns];
    return step % 2 ? make_uint2(u.z, u.w) : make_uint2(u.x, u.y);
  }
  static __device__ __forceinline__ OperandPlace place(int c) {
    return {c / 64 * 2 + c % 16 / 8, c % 64 / 16, c % 8};
  }
  static constexpr bool kInOrder = true;
  static __device__ __forceinline__ int channel(int step, int t) {
    return step / 2 * 64 + t * 16 + step % 2 * 8;
  }
  template <class Words>
  static __device__ __forceinline__ Words in_order(const Words& x) {
    return x;
  }

 private:
  // The first channel of codes[..][i].
  static __device__ __forceinline__ int piece(int i, int g, int t) {
    return i * (kColumns * 64) + (g % kColumns * 4 + t) * 16;
  }
};

template <int kDim>
struct ByteValues {
  uint32_t codes[4][kDim / 32];  // of token 4 t + i: word w, four channels from channel(w, g) on

  static __device__ __forceinline__ int first_byte(int head_dim, int g) {
    return min(g * kFirstPiece, head_dim - kFirstPiece);
  }
  template <bool kShared>
  __device__ __forceinline__ void load_row(int i, const uint8_t* first, int head_dim, int g) {
    const auto step = [&](int at, int bytes) {
      return min(at, head_dim - bytes) - first_byte(head_dim, g);
    };
#pragma unroll
    for (int s = 0; s < kWide; ++s) {
      const auto u = load_piece<uint4, kShared>(first + step(s * 128 + g * 16, 16));
      codes[i][4 * s] = u.x, codes[i][4 * s + 1] = u.y;
      codes[i][4 * s + 2] = u.z, codes[i][4 * s + 3] = u.w;
    }
    if constexpr (kDim % 128 != 0) {
      const auto u = load_piece<uint2, kShared>(first + step(kWide * 128 + g * 8, 8));
      codes[i][4 * kWide] = u.x, codes[i][4 * kWide + 1] = u.y;
    }
  }
  // As code - middle, or as code 2^-24.
  static __device__ __forceinline__ constexpr float middle(bool) { return 128.f; }
  template <bool kCentered, class F>
  __device__ __forceinline__ void for_operands(F&& f) const {
    const auto low = [](uint32_t u) { return kCentered ? centered(codes_low(u)) : tiny_low(u); };
    const auto high = [](uint32_t u) { return kCentered ? centered(codes_high(u)) : tiny_high(u); };
#pragma unroll
    for (int w = 0; w < kDim / 32; ++w) {
      const uint32_t low01 = __byte_perm(codes[0][w], codes[1][w], 0x5140);
      const uint32_t high01 = __byte_perm(codes[0][w], codes[1][w], 0x7362);
      const uint32_t low23 = __byte_perm(codes[2][w], codes[3][w], 0x5140);
      const uint32_t high23 = __byte_perm(codes[2][w], codes[3][w], 0x7362);
      f(w, make_uint4(low(low01), high(low01), low(low23), high(low23)),
        make_uint4(low(high01), high(high01), low(high23), high(high23)));
    }
  }
  static __device__ __forceinline__ int channel(int w, int g) {
    return w < kWide * 4 ? (w / 4) * 128 + g * 16 + (w % 4) * 4
                         : kWide * 128 + g * 8 + (w - kWide * 4) * 4;
  }
  static __device__ __forceinline__ void part(float (&)[4]) {}

 private:
  static constexpr int kWide = kDim / 128;                 // 16-byte pieces of a row
  static constexpr int kFirstPiece = kDim < 128 ? 8 : 16;  // bytes of the first one
};

template <>
struct LaneCodes<Int8> : ByteCodes {};
// Offset is rounded down and scale up: code <= 255 (1 + 2^-22), which rounds to 255.
template <>
constexpr bool kCodesFit<Int8> = true;
template <int kDim, int kColumns>
struct KeyTile<Int8, kDim, kColumns> : ByteKeys<kDim, kColumns> {
  TileParams<Int8> params;
};
template <int kDim>
struct ValueTile<Int8, kDim> : ByteValues<kDim> {
  TileParams<Int8> params;
};

}  // namespace kvquant::cuda
