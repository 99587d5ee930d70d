// How CUDA's kernels read and write the codes of each row format, by template specialisations:
//
//   LaneCodes<Format>          neighbouring channels of a lane: append, gather, a step's new rows,
//                              attention of many query rows (bytes(): its sixteen codes in order)
//   KeyTile<Format, kDim, ..>  a lane's share of 16 tokens' keys: the tensor core's B operands; of
//                              values, too, where pieces of a history are dequantized
//   ValueTile<Format, kDim>    likewise of values: its A operands
//
// A tile's lane is (g, t) = (lane / 4, lane % 4). Which bytes of a row it reads, and what it makes
// of them, is the format's. The kernel needs to know only
//   KeyTile    kColumns: a token's columns of the operand, 1 or 2 (at most kMostColumns). Of two,
//              the even one has the channels of some k-steps, the odd one those of the others, and
//              a lane has four tokens instead of two
//              first_byte(): where a lane's part of a row begins; load_row(): reads it from there
//              operands(j, step): two words of four codes of token j of the lane, for k-step
//              `step`, which is one of column(step); products in the other column are of no use
//              place(c): at which place of the k-steps channel c is. The query is laid out alike,
//              so the order is free; kInOrder: eight neighbouring channels are eight bytes
//              channel(step, t): where a lane's eight channels of a k-step, which are neighbours,
//              begin, a multiple of 8; in_order(): fp16 values, or bytes, of a k-step in the order
//              of the operands
//   ValueTile  first_byte(), load_row(): as above
//              for_operands<kCentered>(f): f(w, even, odd) with the A fragments of m-tiles 2 w and
//              2 w + 1, of code - middle(false) in rows g and of code - middle(true) in rows
//              g + 8, or of code * 2^-24
//              part(): turns the sums of an m-tile's rows into those of channels
//              channel(w, g): the first of the four channels that rows g and g + 8 of m-tiles 2 w
//              and 2 w + 1 are
#pragma once

#include "common/cuda/row.cuh"
#include "formats/formats.h"

namespace kvquant::cuda {

template <class Format>
struct LaneCodes;
template <class Format, int kDim, int kColumns = 1>
struct KeyTile;
template <class Format, int kDim>
struct ValueTile;

// Whether a row of finite channels within fp16's range has codes of 0 .. kMaxCode without a clamp.
template <class Format>
constexpr bool kCodesFit = false;

// Channels to codes, in the steps of formats/row_format.h.
template <class Format>
struct Encoder {
  float offset, inverse;

  __device__ __forceinline__ explicit Encoder(typename Format::Params params) {
    const RowAffine affine = Format::affine(params);
    offset = affine.offset, inverse = __frcp_rn(affine.scale);
  }
  // In the low bits.
  __device__ __forceinline__ uint32_t code(float x) const {
    return round_code(__fmul_rn(__fsub_rn(x, offset), inverse), 0.f, Format::kMaxCode);
  }
  // Where kCodesFit.
  __device__ __forceinline__ uint32_t code_that_fits(float x) const {
    return round_code(__fmul_rn(__fsub_rn(x, offset), inverse));
  }
};

// Params of four neighbouring tokens. They begin with the scale, and zeros mean a scale of zero.
template <class Format>
struct TileParams {
  using Params = typename Format::Params;
  static constexpr int kBytes = sizeof(Params);
  static_assert(kBytes == 2 || kBytes == 4);
  using Words = std::conditional_t<kBytes == 4, uint4, uint2>;
  Words words;

  __device__ __forceinline__ uint32_t& word(int i) {
    return i == 0 ? words.x : i == 1 ? words.y : further(words, i);
  }
  __device__ __forceinline__ uint32_t bits(int i) const {
    const uint32_t word = const_cast<TileParams*>(this)->word(i * kBytes / 4);
    if constexpr (kBytes == 4) return word;
    return i % 2 ? word >> 16 : word & 0xffffu;
  }
  __device__ __forceinline__ void set(int i, Params params) {
    uint32_t bits = 0;
    memcpy(&bits, &params, kBytes);
    uint32_t& to = word(i * kBytes / 4);
    if constexpr (kBytes == 4) {
      to = bits;
    } else {
      to = i % 2 ? (to & 0xffffu) | bits << 16 : (to & 0xffff0000u) | bits;
    }
  }
  // Scales, or offsets, of tokens 2 pair and 2 pair + 1.
  __device__ __forceinline__ uint32_t scales(int pair) const {
    if constexpr (kBytes == 4) return __byte_perm(bits(2 * pair), bits(2 * pair + 1), 0x5410);
    return pair ? words.y : words.x;
  }
  __device__ __forceinline__ uint32_t offsets(int pair) const {
    static_assert((kBytes == 4) != Format::kSymmetric);
    if constexpr (kBytes == 4) return __byte_perm(bits(2 * pair), bits(2 * pair + 1), 0x7632);
    return 0;
  }
  __device__ __forceinline__ RowAffine affine(int i) const {
    const uint32_t of = bits(i);
    Params params;
    memcpy(&params, &of, kBytes);
    return Format::affine(params);
  }
  __device__ __forceinline__ float scale(int i) const { return affine(i).scale; }
  // A NaN counts as the smallest.
  __device__ __forceinline__ float largest_scale() const {
    if constexpr (kBytes == 4) {
      return half2_floats(max_halves(max_halves(words.x, words.y), max_halves(words.z, words.w))).x;
    } else {
      const float2 most = half2_floats(max_halves(words.x, words.y));
      return fmaxf(most.x, most.y);
    }
  }

 private:
  static __device__ __forceinline__ uint32_t& further(uint4& u, int i) {
    return i == 2 ? u.z : u.w;
  }
  static __device__ __forceinline__ uint32_t& further(uint2& u, int) { return u.y; }
};

// Where a channel of a row is among the k-steps of 32: in which step, with which of a row's four
// lanes, at which of the eight bytes that this has of the step.
struct OperandPlace {
  int step, lane, byte;
};

}  // namespace kvquant::cuda

#include "formats/int4.cuh"
#include "formats/int8.cuh"
