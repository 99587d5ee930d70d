// Rows of kDim channels that are rotated as a whole, or not at all: 32 tokens a warp.
//
// A rotation is a matrix H of ones and minus ones over sqrt(kDim), and codes q are integers, so the
// tensor cores rotate codes, exactly, before they are scaled:
//
//   H (scale q + offset + mean) / sqrt(kDim)
//     = scale / sqrt(kDim) H q + offset sqrt(kDim) e0 + mean'
//
// where e0 is 1 in channel 0 alone, and mean' is the group's mean, rotated once for all tokens. H's
// rows are the output's channels, so the operands of keys in attention (KeyTile) serve as they are.
#pragma once

#include "common/cuda/warp_row.cuh"
#include "kernels/pieces/row.cuh"

namespace kvquant::cuda {

constexpr int kTileTokens = 32;

template <class T>
__device__ __forceinline__ const T* shuffle_pointer(const T* p, int lane) {
  const auto bits = reinterpret_cast<uintptr_t>(p);
  const uint32_t low = __shfl_sync(kFullWarp, uint32_t(bits), lane);
  const uint32_t high = __shfl_sync(kFullWarp, uint32_t(bits >> 32), lane);
  return reinterpret_cast<const T*>(uintptr_t(high) << 32 | low);
}

constexpr uint32_t kMinus = 0xfefefefeu;  // turns ones into minus ones
// Bytes of H: 1 or -1 for channels first .. first + 3 of eight neighbours, as operands of row c of
// the matrix have them if only the channels' low three bits count.
constexpr uint32_t hadamard_bytes(int c, int first) {
  uint32_t word = 0;
  for (int b = 0; b < 4; ++b) {
    const int both = c & (first + b);
    const bool odd = (both ^ both >> 1 ^ both >> 2) & 1;
    word |= (odd ? 0xffu : 0x01u) << 8 * b;
  }
  return word;
}

// What a pass over a warp's tokens has in common.
template <int kDim>
struct PieceTile {
  const uint8_t* codes;  // this lane's token's; for tokens of no use, others that can be read
  float scale, offset;   // this lane's token's; NaN or zeros: it cannot be used
  unsigned tokens;       // those to write, as bits
  bool is_rotated;
  Dtype dtype;        // to write
  const float* mean;  // in shared memory; null: none

  __device__ __forceinline__ bool has(int token) const { return tokens >> token & 1; }

  // A group's mean (null: zeros), in the basis of the caller's rows, to shared memory.
  __device__ __forceinline__ void take_mean(const __half* stored, float* shared) {
    float x[1][kDim / 32] = {};
    WarpRow<kDim>::pieces([&](auto width, int i, int channel) {
#pragma unroll
      for (int c = 0; c < width; ++c) {
        if (stored) x[0][i + c] = __half2float(stored[channel + c]);
      }
    });
    if (is_rotated) rotate_warp<kDim>(x, kDim);
    __syncwarp();
    WarpRow<kDim>::pieces([&](auto width, int i, int channel) {
#pragma unroll
      for (int c = 0; c < width; ++c) shared[channel + c] = x[0][i + c];
    });
    __syncwarp();
    mean = shared;
  }
  // Some of the mean's channels, or zeros.
  template <int kCount>
  __device__ __forceinline__ void shift(int channel, float (&x)[kCount]) const {
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      const float4 u = mean ? *reinterpret_cast<const float4*>(mean + channel + i) : float4{};
      x[i] = u.x, x[i + 1] = u.y, x[i + 2] = u.z, x[i + 3] = u.w;
    }
  }

  // Rows of a warp none of whose tokens has codes: NaN keys, zero values.
  __device__ __forceinline__ void fill(uint16_t* out) const {
    const uint32_t pair = finite_pair(scale, scale, dtype);
    const int first = 8 * (threadIdx.x & 31);
    for (int token = 0; token < kTileTokens; ++token) {
      if (!has(token) || first >= kDim) continue;
      *reinterpret_cast<uint4*>(out + token * kDim + first) = make_uint4(pair, pair, pair, pair);
    }
  }

  template <class Format>
  __device__ __forceinline__ void write(uint16_t* out) const {
    if (is_rotated) {
      write_rotated<Format>(out);
    } else {
      write_plain<Format>(out);
    }
  }

  template <class Format>
  __device__ __forceinline__ void write_plain(uint16_t* out) const {
    const int lane = threadIdx.x & 31, g = lane / 4, t = lane % 4;
    using Word = typename LaneCodes<Format>::Word;
    const auto ask = [&](Word(&words)[4], int channel) {
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        words[n] = LaneCodes<Format>::ask(shuffle_pointer(codes, 8 * n + g), channel);
      }
    };
    Word next[4];
    ask(next, 16 * t);
#pragma unroll 1
    for (int i = 0; i < kDim; i += 64) {
      const int channel = i + 16 * t;
      Word words[4];
      memcpy(words, next, sizeof(words));
      if (i + 64 < kDim) ask(next, channel + 64);
      float add[kLaneChannels];
      shift(channel, add);
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const int token = 8 * n + g;
        const float by = __shfl_sync(kFullWarp, scale, token);
        const float from = __shfl_sync(kFullWarp, offset, token);
        float x[kLaneChannels];
        LaneCodes<Format>::decode(words[n], x);
#pragma unroll
        for (int c = 0; c < kLaneChannels; ++c) x[c] = fmaf(by, x[c], from) + add[c];
        store_sixteen(out + token * kDim, x, channel, dtype, true, t % 2, has(token));
      }
    }
  }

  template <class Format>
  __device__ __forceinline__ void write_rotated(uint16_t* out) const {
    using Tile = KeyTile<Format, kDim>;
    static_assert(Tile::kColumns == 1 && kDim * Format::kMaxCode < 1 << 22);
    constexpr int kSteps = kDim / 32;
    constexpr int kBias = 0x4b400000;  // 1.5 * 2^23: bits that sums begin at, to be floats as well
    const int lane = threadIdx.x & 31, g = lane / 4, t = lane % 4;
    const float norm = hadamard_norm(kDim);
    const auto ask = [&](Tile& tile, int token) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const uint8_t* const from = shuffle_pointer(codes, token + 8 * j + g);
        tile.template load_row<false>(j, from + Tile::first_byte(kDim, g, t), kDim, g, t);
      }
    };
    Tile next;
    ask(next, 0);
#pragma unroll 1
    for (int sixteen = 0; sixteen < kTileTokens; sixteen += 16) {
      const Tile tile = next;
      if (sixteen + 16 < kTileTokens) ask(next, sixteen + 16);
      float by[4], constant[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = sixteen + i / 2 * 8 + 2 * t + i % 2;
        by[i] = __shfl_sync(kFullWarp, scale, token) * norm;
        constant[i] = __shfl_sync(kFullWarp, offset, token) * (kDim * norm);
      }
#pragma unroll 1
      for (int first = 0; first < kDim; first += 64) {
        const int channel = first + 8 * g;  // this lane's eight
        int sums[4][2][4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
          for (int j = 0; j < 8; ++j) sums[i][j / 4][j % 4] = kBias;
        }
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          const uint32_t flip = __popc(Tile::channel(step, t) & channel) & 1 ? kMinus : 0;
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const auto row = [&](int c) {
              const uint2 ones =
                  Tile::in_order(make_uint2(hadamard_bytes(c, 0), hadamard_bytes(c, 4)));
              return make_uint2(ones.x ^ flip, ones.y ^ flip);
            };
            const uint2 a = row(2 * i), b = row(2 * i + 1);
#pragma unroll
            for (int j = 0; j < 2; ++j) {
              const uint2 q = tile.operands(j, step);
              mma_16832(sums[i][j], make_uint4(a.x, b.x, a.y, b.y), q.x, q.y);
            }
          }
        }
        float add[8];
        shift(channel, add);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int token = sixteen + i / 2 * 8 + 2 * t + i % 2;
          float x[8];
#pragma unroll
          for (int c = 0; c < 8; ++c) {
            const int sum = sums[c / 2][i / 2][c % 2 * 2 + i % 2];
            x[c] = fmaf(by[i], __int_as_float(sum) - __int_as_float(kBias), add[c]);
          }
          if (channel == 0) x[0] += constant[i];
          const uint4 words = finite_eight(x, dtype);
          if (has(token)) *reinterpret_cast<uint4*>(out + token * kDim + channel) = words;
        }
      }
    }
  }
};

}  // namespace kvquant::cuda
