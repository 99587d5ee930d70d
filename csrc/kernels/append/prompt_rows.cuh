// The rows of an append of many: 16-bit ones of 64, 128 or 256 channels that lie at multiples of 16
// bytes and go behind their sequence.
//
// It is instructions that count: a lane has 32 channels of a row, in pieces of eight, so that what
// is done once a row (parameters, addresses) is shared by more of them, and a warp's accesses are
// whole sectors. A thread reads from shared memory what it has copied there: no barrier.
#pragma once

#include "kernels/append/rows.cuh"

namespace kvquant::cuda {

constexpr int kPieces = 4, kPiece = 8;             // of a lane; channels of one
constexpr int kPromptChannels = kPieces * kPiece;  // of a lane
constexpr int kPromptTokens = 256;                 // of a block

// Lane `index` of a row has channels (piece * kLanes + index) * 8 ...
template <int kDim>
struct PromptLanes {
  static constexpr int kWarps = kDim / 16, kThreads = kWarps * 32;
  static constexpr int kLanes = kDim / kPromptChannels, kRows = 32 / kLanes;  // a row's; a warp's
  static constexpr int kSlots = kWarps * kRows, kSteps = kPromptTokens / kSlots;

  int lane, index, slot;
  unsigned row_mask;  // the row's lanes

  __device__ __forceinline__ PromptLanes() {
    lane = threadIdx.x % 32;
    index = lane % kLanes;
    slot = int(threadIdx.x) / kLanes;
    row_mask = ((1u << kLanes) - 1) << (lane - index);
  }
  // Of x[c], in which a lane has its channels.
  __device__ __forceinline__ int channel(int c) const {
    return (c / kPiece * kLanes + index) * kPiece + c % kPiece;
  }
  // All lanes of the warp must call, as below.
  __device__ __forceinline__ bool all(bool holds) const {
    return (__ballot_sync(kFullWarp, holds) & row_mask) == row_mask;
  }
  __device__ __forceinline__ float max(float x) const {
#pragma unroll
    for (int step = 1; step < kLanes; step *= 2) {
      x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, step));
    }
    return x;
  }
};

using PromptRow = float[kPromptChannels];

// In the order of steps that common/hadamard.h fixes. All lanes of the warp must call.
template <int kDim>
__device__ __forceinline__ void rotate(PromptRow& x, const PromptLanes<kDim>& at) {
  const auto butterflies = [&](int step) {
#pragma unroll
    for (int i = 0; i < kPromptChannels; ++i) {
      if (i & step) continue;
      const float sum = x[i] + x[i + step], difference = x[i] - x[i + step];
      x[i] = sum, x[i + step] = difference;
    }
  };
#pragma unroll
  for (int step = 1; step < kPiece; step *= 2) butterflies(step);
#pragma unroll
  for (int step = 1; step < PromptLanes<kDim>::kLanes; step *= 2) {
    const float sign = at.index & step ? -1.f : 1.f;
#pragma unroll
    for (int i = 0; i < kPromptChannels; ++i) {
      x[i] = fmaf(x[i], sign, __shfl_xor_sync(kFullWarp, x[i], step));
    }
  }
#pragma unroll
  for (int step = kPiece; step < kPromptChannels; step *= 2) butterflies(step);
  const float norm = hadamard_norm(kDim);
#pragma unroll
  for (int i = 0; i < kPromptChannels; ++i) x[i] = __fmul_rn(x[i], norm);
}

// Two neighbouring elements of 16 bits.
template <class T>
struct Pair;
template <>
struct Pair<__half> {
  using Type = __half2;
  static constexpr bool kIsHalf = true;
  static __device__ __forceinline__ float2 floats(uint32_t pair) { return half2_floats(pair); }
};
template <>
struct Pair<__nv_bfloat16> {
  using Type = __nv_bfloat162;
  static constexpr bool kIsHalf = false;
  static __device__ __forceinline__ float2 floats(uint32_t pair) {
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
  }
};
// The larger magnitudes of two pairs, a NaN prevails. Their signs mean nothing.
template <class T>
__device__ __forceinline__ uint32_t max_magnitudes(uint32_t a, uint32_t b) {
#if __CUDA_ARCH__ >= 860
  uint32_t most;
  if constexpr (Pair<T>::kIsHalf) {
    asm("max.NaN.xorsign.abs.f16x2 %0, %1, %2;" : "=r"(most) : "r"(a), "r"(b));
  } else {
    asm("max.NaN.xorsign.abs.bf16x2 %0, %1, %2;" : "=r"(most) : "r"(a), "r"(b));
  }
  return most;
#else
  a &= 0x7fff7fffu, b &= 0x7fff7fffu;
  typename Pair<T>::Type x, y;
  memcpy(&x, &a, 4), memcpy(&y, &b, 4);
  x = __hmax2_nan(x, y);
  memcpy(&a, &x, 4);
  return a;
#endif
}

// A lane's channels of a row as they come.
template <class T>
struct PromptWords {
  using T2 = typename Pair<T>::Type;
  uint4 words[kPieces];

  __device__ __forceinline__ uint32_t pair(int i) const {
    const uint4& word = words[i / 4];
    return i % 4 == 0 ? word.x : i % 4 == 1 ? word.y : i % 4 == 2 ? word.z : word.w;
  }
  __device__ __forceinline__ void read(PromptRow& x) const {
#pragma unroll
    for (int i = 0; i < kPromptChannels / 2; ++i) {
      const float2 y = Pair<T>::floats(pair(i));
      x[2 * i] = y.x, x[2 * i + 1] = y.y;
    }
  }
  // Whether all of the row is finite. All lanes of the warp must call, as below.
  template <int kDim>
  __device__ __forceinline__ bool is_finite(const PromptLanes<kDim>& at) const {
    uint32_t most = pair(0);
#pragma unroll
    for (int i = 1; i < kPromptChannels / 2; ++i) most = max_magnitudes<T>(most, pair(i));
    const float2 y = Pair<T>::floats(most);
    return at.all(fabsf(y.x) <= kMaxAbs && fabsf(y.y) <= kMaxAbs);
  }
  // Likewise, with its least and largest element.
  template <int kDim>
  __device__ __forceinline__ bool range(const PromptLanes<kDim>& at, float& low,
                                        float& high) const {
    const float2 least = reduce([](T2 a, T2 b) { return __hmin2_nan(a, b); });
    const float2 most = reduce([](T2 a, T2 b) { return __hmax2_nan(a, b); });
    low = -at.max(-fminf(least.x, least.y));
    high = at.max(fmaxf(most.x, most.y));
    return at.all(least.x >= -kMaxAbs && least.y >= -kMaxAbs && most.x <= kMaxAbs &&
                  most.y <= kMaxAbs);
  }

 private:
  template <class F>
  __device__ __forceinline__ float2 reduce(F&& step) const {
    T2 best;
#pragma unroll
    for (int i = 0; i < kPromptChannels / 2; ++i) {
      const uint32_t bits = pair(i);
      T2 x;
      memcpy(&x, &bits, 4);
      best = i ? step(best, x) : x;
    }
    return make_float2(to_float(best.x), to_float(best.y));
  }
};

// The rows of a block in shared memory.
template <class T, int kDim>
struct PromptStage {
  using Lanes = PromptLanes<kDim>;
  uint4 words[Lanes::kSteps][kPieces][Lanes::kThreads];

  // Asks for the rows of tokens [begin, end), a group of copies a step.
  template <class Format>
  __device__ __forceinline__ void ask(const Source<Format, T>& src, const Lanes& at, int begin,
                                      int end) {
    const T* row = src.row(begin + at.slot - src.length) + at.channel(0);
#pragma unroll
    for (int step = 0; step < Lanes::kSteps; ++step) {
      if (begin + at.slot + step * Lanes::kSlots < end) {
#pragma unroll
        for (int i = 0; i < kPieces; ++i) {
          copy_async<16>(&words[step][i][threadIdx.x], row + i * (Lanes::kLanes * kPiece));
        }
      }
      close_copies();
      row += Lanes::kSlots * src.rows.token_stride;
    }
  }
  // Calls body(step, token, row) for the rows that are this thread's, as they come. All lanes of a
  // warp call it as often; a token from `end` on has no row.
  template <class F>
  __device__ __forceinline__ void for_rows(const Lanes& at, int begin, int end, F&& body) const {
#pragma unroll 1
    for (int step = 0; begin + step * Lanes::kSlots < end; ++step) {
      wait_copies<Lanes::kSteps - 1>(Lanes::kSteps - 1 - step);
      PromptWords<T> row;
#pragma unroll
      for (int i = 0; i < kPieces; ++i) row.words[i] = words[step][i][threadIdx.x];
      body(step, begin + at.slot + step * Lanes::kSlots, row);
    }
  }
};

// As write_rows of rows.cuh. mean: of the group, as floats; null: none. finite: which steps' rows
// are, where there is a mean.
template <class Format, class T, int kDim>
__device__ __forceinline__ void write_rows(const Source<Format, T>& src,
                                           const PromptLanes<kDim>& at,
                                           const PromptStage<T, kDim>& stage, int begin, int end,
                                           const float* mean, uint32_t finite_steps) {
  const bool rotated = src.rotation() > 1;
  stage.for_rows(at, begin, end, [&](int step, int token, const PromptWords<T>& row) {
    const Place to = token < end ? src.stored(token) : Place{-1, 0};
    PromptRow x;
    row.read(x);
    float low = INFINITY, high = -INFINITY;
    bool finite;
    if (rotated || mean) {
      if (rotated) rotate(x, at);
      if (mean) {
#pragma unroll
        for (int i = 0; i < kPromptChannels; i += 4) {
          const float4 y = *reinterpret_cast<const float4*>(mean + at.channel(i));
          x[i] = __fsub_rn(x[i], y.x), x[i + 1] = __fsub_rn(x[i + 1], y.y);
          x[i + 2] = __fsub_rn(x[i + 2], y.z), x[i + 3] = __fsub_rn(x[i + 3], y.w);
        }
      }
#pragma unroll
      for (int i = 0; i < kPromptChannels; ++i) low = fminf(low, x[i]), high = fmaxf(high, x[i]);
      low = -at.max(-low);
      high = at.max(high);
      finite = mean ? finite_steps >> step & 1 : row.is_finite(at);
    } else {
      finite = row.range(at, low, high);
    }
    const auto params = Format::params(low, high, finite);
    const Encoder<Format> encoder(params);
    const bool fits = to.block < 0 || (finite && low >= -kMaxAbs && high <= kMaxAbs);
    const bool all_fit = kCodesFit<Format> && __all_sync(kFullWarp, fits);
    if (to.block < 0) return;
    uint8_t* const codes = src.codes(to);
    if (all_fit) {
#pragma unroll
      for (int i = 0; i < kPromptChannels; i += kPiece) {
        LaneCodes<Format>::template store<kPiece>(
            codes, at.channel(i), [&](int c) { return encoder.code_that_fits(x[i + c]); });
      }
    } else {
#pragma unroll
      for (int i = 0; i < kPromptChannels; i += kPiece) {
        LaneCodes<Format>::template store<kPiece>(codes, at.channel(i),
                                                  [&](int c) { return encoder.code(x[i + c]); });
      }
    }
    if (at.index == 0) *src.params(to) = params;
  });
}

}  // namespace kvquant::cuda
