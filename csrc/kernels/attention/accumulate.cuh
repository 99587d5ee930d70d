// The running softmax of a warp and its sums of weighted values.
//
//   P V    A = V^T (rows = channels), B = P^T.
//
// Values are taken relative to the middle code, and the middle of their row, 128 v_scale + v_offset
// in 8 bits, with the weight p itself. So rounding p v_scale costs in proportion to a value's
// distance from the middle, and nothing that all channels share, which a rotation of the values
// would gather in one of them (measured with the middle times the rounded weight: 1.3e-3 of the
// largest output at head_dim 256).
#pragma once

#include "kernels/attention/tile.cuh"

namespace kvquant::cuda {

// The largest scores of this lane's rows among all lanes that have them.
template <int kRowSets>
__device__ __forceinline__ void reduce_rows(float (&best)[kRowSets]) {
#pragma unroll
  for (int r = 0; r < kRowSets; ++r) {
    best[r] = fmaxf(best[r], __shfl_xor_sync(kFullWarp, best[r], 1));
    best[r] = fmaxf(best[r], __shfl_xor_sync(kFullWarp, best[r], 2));
  }
}

// Weights in fp16. Sums of p, of p times scales and of p times offsets are products of the tensor
// core, too, and so is that of the rounded weights.
//
// Operands are codes in the low bits of a half, subnormals which the tensor core takes as they are:
// code 2^-24. Their middle leaves the accumulators now and then, before they grow so large that its
// truncating adder biases them (relative error 3e-3 after 4k tokens of a warp).
template <class Traits>
class HalfAccumulator {
  static constexpr int kRowSets = Traits::kRowSets;
  static constexpr float kUnit = 0x1p-24f;  // of an operand
  // p carries 2^kRaise, so that small ones are no subnormals, and bases follow larger scores only
  // beyond kLazy: p is at most 2^11.
  static constexpr float kRaise = 7.f, kLazy = 4.f;
  static constexpr float kHeadroom = 16.f;  // of lifted scales, which begin between 1 and 2
  static constexpr int kMostLift = 15;      // log2

 public:
  // Pieces of a warp between two flushes.
  static constexpr int kFlush = 32 / Traits::kTiles;

  // Lets bases and the scales' lift follow where they must; rescales what was summed before.
  __device__ __forceinline__ void rescale(float (&best)[kRowSets], float v_scale, int t) {
    bool grows = v_scale > scale_limit_;
#pragma unroll
    for (int r = 0; r < kRowSets; ++r) grows |= best[r] > base_[r] + (kRaise + kLazy);
    if (!__any_sync(kFullWarp, grows)) return;
    reduce_rows(best);
    v_scale = fminf(warp_max(v_scale), kMaxAbs);
    float lifted = 1.f;
    if (v_scale > scale_limit_) {
      const float before = unlift_;
      const int lift = min(max(-ilogbf(v_scale), -kMostLift), kMostLift);
      if constexpr (Traits::kTakesWhole) {  // a division's call would cost registers
        unlift_ = exp2_approx(float(-lift));
        const float raised = exp2_approx(float(lift));
        lift_ = half2_bits(__float2half2_rn(raised));
        scale_limit_ = kHeadroom * unlift_;
        lifted = before * raised;
      } else {
        unlift_ = exp2f(float(-lift));
        lift_ = half2_bits(__float2half2_rn(exp2f(float(lift))));
        scale_limit_ = kHeadroom * unlift_;
        lifted = before / unlift_;
      }
    }
#pragma unroll
    for (int r = 0; r < kRowSets; ++r) {
      const float base = fmaxf(base_[r], best[r] - kRaise);
      const float shrink = exp2_approx(base_[r] - base);
      base_[r] = base;
      const float z[2] = {__shfl_sync(kFullWarp, shrink, t * 8),
                          __shfl_sync(kFullWarp, shrink, t * 8 + 4)};
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        sums_[r][q] *= z[q % 2];
        weights_[r][q] *= z[q % 2] * lifted;
#pragma unroll
        for (int i = 0; i < Traits::kDim / 16; ++i) c_[i][r][q] *= z[q % 2] * lifted;
      }
    }
  }

  // Adds a tile's values. Params of tokens that nobody sees are zeros.
  template <class Value>
  __device__ __forceinline__ void add(const float (&score)[kRowSets][4],
                                      const TileParams<Value>& params,
                                      const ValueTile<Value, Traits::kDim>& values) {
    uint32_t scale[2], first[2], weight[kRowSets][2];
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      scale[pair] = params.scales(pair);
      first[pair] = offsets_or_ones(params.offsets(pair));
    }
    const uint4 a = make_uint4(first[0], scale[0], first[1], scale[1]);
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) scale[pair] = mul_halves(scale[pair], lift_);
#pragma unroll
    for (int r = 0; r < kRowSets; ++r) {
      uint32_t p[2];
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        p[pair] = half2_bits(__floats2half2_rn(exp2_approx(score[r][2 * pair] - base_[r]),
                                               exp2_approx(score[r][2 * pair + 1] - base_[r])));
        weight[r][pair] = mul_halves(p[pair], scale[pair]);
      }
      mma_16816(sums_[r], a, p[0], p[1]);
      mma_16816(weights_[r], make_uint4(kOnes, kOnes, kOnes, kOnes), weight[r][0], weight[r][1]);
    }
    values.template for_operands<false>([&](int w, const uint4& even, const uint4& odd) {
#pragma unroll
      for (int r = 0; r < kRowSets; ++r) {
        mma_16816(c_[2 * w][r], even, weight[r][0], weight[r][1]);
        mma_16816(c_[2 * w + 1][r], odd, weight[r][0], weight[r][1]);
      }
    });
  }
  // To be called now and then, with the format of what was added.
  template <class Value>
  __device__ __forceinline__ void flush() {
    using Values = ValueTile<Value, Traits::kDim>;
#pragma unroll
    for (int r = 0; r < kRowSets; ++r) {
#pragma unroll
      for (int q = 0; q < 4; ++q) {
#pragma unroll
        for (int i = 0; i < Traits::kDim / 16; ++i) {
          c_[i][r][q] = fmaf(-Values::middle(q >= 2) * kUnit, weights_[r][q], c_[i][r][q]);
        }
        weights_[r][q] = 0.f;
      }
    }
  }

  // Ends what was added in a format: what is added next may be in another.
  template <class Value>
  __device__ __forceinline__ void settle() {
    constexpr float kMiddle = Value::kSymmetric ? 0.f : Value::kMiddleCode;
    flush<Value>();
    const bool has_offsets = !(threadIdx.x & 4);  // g
#pragma unroll
    for (int r = 0; r < kRowSets; ++r) {
#pragma unroll
      for (int i = 0; i < Traits::kDim / 16; ++i) {
        ValueTile<Value, Traits::kDim>::part(c_[i][r]);
      }
#pragma unroll
      for (int q = 0; q < 2; ++q) {
        if (has_offsets) sums_[r][q] = fmaf(kMiddle, sums_[r][2 + q], sums_[r][q]);
        sums_[r][2 + q] = 0.f;
      }
    }
  }

  // All being settled: the four channels of word w of query 2 t + q of row set r.
  template <int r>
  __device__ __forceinline__ float4 channels(int w, int q) const {
    const float unit = unlift_ * (1.f / kUnit);
    const float (&even)[4] = c_[2 * w][r], (&odd)[4] = c_[2 * w + 1][r];
    return make_float4(even[q] * unit, even[q + 2] * unit, odd[q] * unit, odd[q + 2] * unit);
  }
  // Leaves (base, sum of p, sum of p times middles) of the eight rows of row set r.
  template <int r>
  __device__ __forceinline__ void store_rows(float4 (&to)[8], int g, int t) const {
    if (t == 0) to[g].x = base_[r];
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      if (g == 0) to[2 * t + q].z = sums_[r][q];
      if (g == 1) to[2 * t + q].y = sums_[r][q];
    }
  }

 private:
  static constexpr uint32_t kOnes = 0x3c003c00u;

  // Rows g sum offsets, but weights where g is odd.
  static __device__ __forceinline__ uint32_t offset_rows() {
    return Traits::kTakesWhole ? kept(threadIdx.x & 4 ? 0u : ~0u) : 0u;
  }
  __device__ __forceinline__ uint32_t offsets_or_ones(uint32_t offsets) const {
    if constexpr (Traits::kTakesWhole) {
      return (offsets & offset_rows_) | (kOnes & ~offset_rows_);
    } else {
      return threadIdx.x & 4 ? kOnes : offsets;
    }
  }

  // Of weights times operands: m-tiles of 16 rows; [0], [1]: row g, queries 2t, 2t + 1; [2], [3]:
  // row g + 8.
  float c_[Traits::kDim / 16][kRowSets][4] = {};
  float weights_[kRowSets][4] = {};  // their sum since the last flush, in every row
  float sums_[kRowSets][4] = {};     // rows g: of p offset, of p if g is odd; g + 8: of p scale
  float base_[kRowSets];
  uint32_t offset_rows_ = offset_rows();
  uint32_t lift_ = kOnes;  // halves that scales are multiplied by
  float unlift_ = 1.f, scale_limit_ = 0.f;

 public:
  __device__ __forceinline__ HalfAccumulator() {
#pragma unroll
    for (int r = 0; r < kRowSets; ++r) base_[r] = kNoScore;
  }
};

// Weights in fp16 and what fp16 left of them, for float32. One row set.
template <class Traits>
class SplitAccumulator {
  static constexpr float kLazy = 6.f;  // log2
  static constexpr float kHeadroom = 256.f;

 public:
  static constexpr int kFlush = 1 << 20;  // nothing to flush

  __device__ __forceinline__ void rescale(float (&best)[1], float v_scale, int t) {
    const bool grows = v_scale > scale_limit_ || best[0] > base_ + (lift_ + kLazy);
    if (!__any_sync(kFullWarp, grows)) return;
    reduce_rows(best);
    v_scale = fminf(warp_max(v_scale), kMaxAbs);
    const float before = lift_;
    if (v_scale > scale_limit_) {
      lift_ = 4.f - float(ilogbf(v_scale));
      scale_limit_ = kHeadroom * exp2f(-lift_);
    }
    const float base = fmaxf(base_ + before, best[0]) - lift_;
    const float shrink = exp2_approx(base_ - base);
    base_ = base;
    sum_ *= shrink;
    middles_ *= shrink;
    const float z[2] = {__shfl_sync(kFullWarp, shrink, t * 8),
                        __shfl_sync(kFullWarp, shrink, t * 8 + 4)};
#pragma unroll
    for (int i = 0; i < Traits::kDim / 16; ++i) {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int q = 0; q < 4; ++q) c_[i][n][q] *= z[q % 2];
      }
    }
  }
  template <class Value>
  __device__ __forceinline__ void add(const float (&score)[1][4], const TileParams<Value>& params,
                                      const ValueTile<Value, Traits::kDim>& values) {
    uint32_t weight[2][2];
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      float w[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float p = exp2_approx(score[0][2 * pair + i] - base_);
        const RowAffine affine = params.affine(2 * pair + i);
        sum_ += p;
        middles_ = fmaf(p, fmaf(Value::kMiddleCode, affine.scale, affine.offset), middles_);
        w[i] = p * affine.scale;
      }
      const __half2 rounded = __floats2half2_rn(w[0], w[1]);
      const float2 seen = __half22float2(rounded);
      weight[0][pair] = half2_bits(rounded);
      weight[1][pair] = half2_bits(__floats2half2_rn(w[0] - seen.x, w[1] - seen.y));
    }
    values.template for_operands<true>([&](int w, const uint4& even, const uint4& odd) {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        mma_16816(c_[2 * w][n], even, weight[n][0], weight[n][1]);
        mma_16816(c_[2 * w + 1][n], odd, weight[n][0], weight[n][1]);
      }
    });
  }
  template <class Value>
  __device__ __forceinline__ void flush() {}
  template <class Value>
  __device__ __forceinline__ void settle() {
#pragma unroll
    for (int i = 0; i < Traits::kDim / 16; ++i) {
#pragma unroll
      for (int n = 0; n < 2; ++n) ValueTile<Value, Traits::kDim>::part(c_[i][n]);
    }
  }
  template <int r>
  __device__ __forceinline__ float4 channels(int w, int q) const {
    const float (&even)[2][4] = c_[2 * w], (&odd)[2][4] = c_[2 * w + 1];
    return make_float4(even[0][q] + even[1][q], even[0][q + 2] + even[1][q + 2],
                       odd[0][q] + odd[1][q], odd[0][q + 2] + odd[1][q + 2]);
  }
  template <int r>
  __device__ __forceinline__ void store_rows(float4 (&to)[8], int g, int t) const {
    float sum = sum_, middles = middles_;
#pragma unroll
    for (int step = 1; step < 4; step <<= 1) {
      sum += __shfl_xor_sync(kFullWarp, sum, step);
      middles += __shfl_xor_sync(kFullWarp, middles, step);
    }
    if (t == 0) to[g] = make_float4(base_, sum, middles, 0.f);
  }

 private:
  float c_[Traits::kDim / 16][2][4] = {};  // of both weights times operands
  float base_ = kNoScore, sum_ = 0.f, middles_ = 0.f;
  // Bases stand this far below the largest scores, so that p v_scale fits fp16 whatever V's scale.
  float lift_ = 0.f;
  float scale_limit_ = 0.f;  // the largest v_scale that the lift serves
};

template <class Traits>
using Accumulator =
    std::conditional_t<Traits::kSplit, SplitAccumulator<Traits>, HalfAccumulator<Traits>>;

}  // namespace kvquant::cuda
