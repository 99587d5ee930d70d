// A block's query rows, many of them: rotated and rounded to integers of two signed bytes, as
// operands of the integer tensor cores.
#pragma once

#include "kernels/attention/query.cuh"
#include "kernels/rows/config.h"
#include "kernels/rows/wgmma.cuh"

namespace kvquant::cuda {

// kIsAligned: a thread's four neighbouring channels of every row of the caller's are one access.
template <class Formats, int kHeadDim, int kRowCount, class T, bool kIsAligned>
struct RowsTraits {
  using Key = typename Formats::Key;
  using Value = typename Formats::Value;
  static constexpr bool kByAge = Formats::kByAge;
  using Element = T;
  static constexpr bool kAligned = kIsAligned;
  static constexpr int kDim = kHeadDim, kRows = kRowCount;
  static constexpr InstanceShape kShape = kRowsShape;
  static constexpr int kWarps = kShape.warps, kThreads = kShape.threads();
  static constexpr int kRowsPerWarp = kRows / kWarps;
  static constexpr int kThreadRows = kRows / 32;  // g and g + 8 of the warp's
  static constexpr int kPartialFloats = partial_floats(kDim, kRows);
  static constexpr int kStages = kShape.stages;
  static constexpr int kKeyBytes = Key::code_bytes(kDim), kValueBytes = Value::code_bytes(kDim);
  static constexpr bool kUnpacksKeys = kKeyBytes < kDim;
};

// Matrices of 64 rows. 64 query rows: the high bytes of all, then the low ones. 32: of each eight,
// the high bytes, then the low ones, so that a thread has both products.
template <class Traits>
struct RowsQuery {
  static constexpr int kBytes = 64 * Traits::kDim;
  alignas(1024) uint8_t bytes[Traits::kThreadRows][kBytes];

  // Four channels from c on: high bytes and low ones.
  __device__ __forceinline__ void put(int row, int c, uint32_t high, uint32_t low) {
    constexpr bool kAll = Traits::kThreadRows == 2;
    const int at = kAll ? row : row / 8 * 16 + row % 8;
    word(bytes[0], at, c) = high;
    word(bytes[kAll ? 1 : 0], kAll ? at : at + 8, c) = low;
  }
  // Those of a row of a matrix.
  __device__ __forceinline__ uint32_t get(int matrix, int row, int c) const {
    return word(const_cast<uint8_t*>(bytes[matrix]), row, c);
  }

 private:
  static __device__ __forceinline__ uint32_t& word(uint8_t* matrix, int row, int c) {
    return *reinterpret_cast<uint32_t*>(matrix + Swizzle<Traits::kDim>::place(row, c / 16) +
                                        c % 16);
  }
};

// c += a b for 16-bit a (16 x 16, rows) and b (16 x 8, columns), fp32 c.
__device__ __forceinline__ void multiply_elements(float (&c)[4], const uint4& a, uint32_t b0,
                                                  uint32_t b1, Dtype dtype) {
  if (dtype == Dtype::kFloat16) return mma_16816(c, a, b0, b1);
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}

// The larger one, or NaN.
__device__ __forceinline__ float max_or_nan(float x, float y) {
  float z;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
  return z;
}

// Butterflies between rows' pieces of 16 channels, of which a thread has four each.
template <int kThreadRows, int kSteps>
__device__ __forceinline__ void rotate_sixteens(float (&x)[kThreadRows][kSteps][4]) {
#pragma unroll
  for (int step = 1; step < kSteps; step <<= 1) {
#pragma unroll
    for (auto& row : x) {
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        if (i & step) continue;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float a = row[i][j], b = row[i + step][j];
          row[i][j] = a + b, row[i + step][j] = a - b;
        }
      }
    }
  }
}

// A thread's part of its warp's rows, g and g + 8: of each 16 channels the four from 4 t on.
template <class Traits>
class RowsOfThread {
  static constexpr int kThreadRows = Traits::kThreadRows, kSteps = Traits::kDim / 16;
  using Element = typename Traits::Element;

 public:
  // row: the first one in the block. Rows that are none repeat the last one.
  __device__ __forceinline__ void ask(const AttentionCall& p, const RowTile& rows, int row, int t) {
    const CallRows call{rows.first_call_row, 0};
#pragma unroll
    for (int r = 0; r < kThreadRows; ++r) {
      const int at = min(row + 8 * r, rows.count - 1);
      const Element* const from =
          static_cast<const Element*>(p.query.data) +
          row_offset(p.query, p.seqs, call, rows.sequence, rows.token_of(at)) +
          rows.head_of(at) * p.query.head_stride + 4 * t;
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        if constexpr (Traits::kAligned) {
          asked_[r][i] = load_keep<uint2>(from + 16 * i);
        } else {
          Element x[4];
#pragma unroll
          for (int j = 0; j < 4; ++j) x[j] = from[16 * i + j];
          memcpy(&asked_[r][i], x, sizeof(x));
        }
      }
    }
  }
  // Rotates, scales and rounds them. sum, gain: as RowScale's.
  __device__ __forceinline__ void prepare(const AttentionCall& p, RowsQuery<Traits>& query,
                                          float (&sum)[kThreadRows], float (&gain)[kThreadRows],
                                          int row, int g, int t) {
    float x[kThreadRows][kSteps][4];
    rotate(p, x, g, t);
#pragma unroll
    for (int r = 0; r < kThreadRows; ++r) {
      float most = 0.f;
#pragma unroll
      for (const auto& four : x[r]) {
#pragma unroll
        for (float y : four) most = max_or_nan(most, fabsf(y));
      }
#pragma unroll
      for (int step = 1; step < 4; step <<= 1) {
        most = max_or_nan(most, __shfl_xor_sync(kFullWarp, most, step));
      }
      // As prepare_query's. A precise division is a call, which costs registers.
      const float unit = most * (1.f / (127.f * 256.f));
      const float inverse = unit > 1e-37f ? __fdividef(1.f, unit) : 0.f;
      int total = 0;
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        uint32_t high, low;
        round_to_bytes<4>(x[r][i], inverse, high, low, total);
        query.put(row + 8 * r, 16 * i + 4 * t, high, low);
      }
#pragma unroll
      for (int step = 1; step < 4; step <<= 1) total += __shfl_xor_sync(kFullWarp, total, step);
      const float norm = hadamard_norm(p.cache.k.rotation) * p.softmax_scale * kLog2e;
      sum[r] = float(total), gain[r] = most < INFINITY ? unit * norm : NAN;
    }
  }

 private:
  uint2 asked_[kThreadRows][kSteps];

  // If they are rotated; not normalized. Within 16 channels by a matrix of ones, whose rows and
  // columns are in the order in which threads have channels.
  __device__ __forceinline__ void rotate(const AttentionCall& p, float (&x)[kThreadRows][kSteps][4],
                                         int g, int t) const {
    const bool is_rotated = p.cache.k.rotation > 1;
    const uint32_t one = p.dtype == Dtype::kFloat16 ? 0x3c00u : 0x3f80u;
    uint32_t b[2][2] = {};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int half = i / 4, pair = i / 2 % 2, j = i % 2;
      const int from = 4 * t + 2 * pair + j, to = g / 2 * 4 + 2 * half + g % 2;
      const uint32_t sign = uint32_t(__popc(from & to) & 1) << 15;
      const uint32_t of = is_rotated ? one | sign : from == to ? one : 0;
      b[half][pair] |= of << (16 * j);
    }
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const uint2 low = asked_[0][i];
      const uint2 high = kThreadRows == 2 ? asked_[kThreadRows - 1][i] : make_uint2(0, 0);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float c[4] = {};
        multiply_elements(c, make_uint4(low.x, high.x, low.y, high.y), b[half][0], b[half][1],
                          p.dtype);
#pragma unroll
        for (int r = 0; r < kThreadRows; ++r) {
          x[r][i][2 * half] = c[2 * r], x[r][i][2 * half + 1] = c[2 * r + 1];
        }
      }
    }
    if (is_rotated) rotate_sixteens(x);
  }
};

}  // namespace kvquant::cuda
