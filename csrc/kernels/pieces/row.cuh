// Where a token of a piece is and what its codes mean, for a lane.
#pragma once

#include "common/age.h"
#include "common/paging.h"
#include "formats/formats.cuh"

namespace kvquant::cuda {

struct PieceRow {
  const uint8_t* codes = nullptr;  // null: the token has no place, or is not asked for
  RowFormat format{};              // of the codes
  RowAffine affine;                // of one that cannot be used: NaN of a key, zeros of a value
  const __half* mean = nullptr;    // of the key's group, as it is stored

  __device__ __forceinline__ explicit PieceRow(bool is_key) : affine{is_key ? NAN : 0.f, 0.f} {}
};

__device__ __forceinline__ int token_of(const Piece& piece, int i) {
  return piece.first + (piece.backwards ? piece.tokens - 1 - i : i);
}

// Row i of a piece, of a sequence and head.
__device__ __forceinline__ PieceRow row_of_piece(const PieceParams& p, const Piece& piece,
                                                 const Paging& paging, bool is_key, int sequence,
                                                 int head, int i) {
  const int token = token_of(piece, i);
  PieceRow row(is_key);
  if (i >= piece.tokens || token < piece.low || token >= piece.high) return row;
  const Place old = place_of(p.cache, p.seqs, paging, sequence, token);
  if (old.block < 0) return row;
  const auto take = [&](const CacheView& view, Place at) {
    const auto read = [&](const RowsView& rows, bool is_own) {
      RowAffine affine;
      with_format(rows.format, RowFormats{}, [&](auto format) {
        using Format = decltype(format);
        using Params = typename Format::Params;
        affine = Format::affine(rows_of<Params>(rows.params, at.block, head)[at.row]);
        if (!is_own) return;
        row.codes = rows_of<uint8_t>(rows.codes, at.block, head) +
                    int64_t(at.row) * Format::code_bytes(rows.head_dim);
        row.format = Format::kTag;
      });
      return affine;
    };
    const RowAffine key = read(view.k, is_key), value = read(view.v, !is_key);
    // A token of which one is not finite has neither.
    if (!isnan(key.scale) && !isnan(value.scale)) row.affine = is_key ? key : value;
  };
  const int age = age_group(p.cache, p.seqs);
  if (age && (token < age || token >= p.young_from)) {
    take(young_view(p.cache, p.seqs), {sequence, young_row(age, token)});
  } else {
    take(p.cache, old);
  }
  if (is_key && p.cache.mean_group) {
    row.mean = mean_of<__half>(p.cache, p.seqs, paging, sequence, head, token);
  }
  return row;
}

// Two elements of 16 bits. Rounding does not lead to an infinity; a NaN stays one. (Before 8.0
// dense kernels do not run; it only has to compile.)
__device__ __forceinline__ uint32_t finite_pair(float low, float high, Dtype dtype) {
#if __CUDA_ARCH__ >= 800
  uint32_t halves, others;
  asm("cvt.rn.satfinite.f16x2.f32 %0, %1, %2;" : "=r"(halves) : "f"(high), "f"(low));
  asm("cvt.rn.satfinite.bf16x2.f32 %0, %1, %2;" : "=r"(others) : "f"(high), "f"(low));
  return dtype == Dtype::kBFloat16 ? others : halves;
#else
  const auto finite = [&](float x) {
    x = isnan(x) ? x : fminf(fmaxf(x, -kMaxAbs), kMaxAbs);
    return uint32_t(from_float<Element16>(x, dtype).bits);
  };
  return finite(low) | finite(high) << 16;
#endif
}

// Eight neighbouring channels of a row.
__device__ __forceinline__ uint4 finite_eight(const float* x, Dtype dtype) {
  return make_uint4(finite_pair(x[0], x[1], dtype), finite_pair(x[2], x[3], dtype),
                    finite_pair(x[4], x[5], dtype), finite_pair(x[6], x[7], dtype));
}

// Sixteen channels of a row, from `channel` on. If lanes come in pairs, each two of which have 32
// neighbouring channels, an access writes whole sectors. All lanes of the warp must call.
__device__ __forceinline__ void store_sixteen(uint16_t* row, const float (&x)[kLaneChannels],
                                              int channel, Dtype dtype, bool is_paired, bool is_odd,
                                              bool mine) {
  const uint4 low = finite_eight(x, dtype), high = finite_eight(x + 8, dtype);
  if (!is_paired) {
    uint4* const to = reinterpret_cast<uint4*>(row + channel);
    if (mine) to[0] = low, to[1] = high;
    return;
  }
  uint4 give = is_odd ? low : high;
  give.x = __shfl_xor_sync(kFullWarp, give.x, 1), give.y = __shfl_xor_sync(kFullWarp, give.y, 1);
  give.z = __shfl_xor_sync(kFullWarp, give.z, 1), give.w = __shfl_xor_sync(kFullWarp, give.w, 1);
  if (!mine) return;
  // The even lane's 32 bytes, then the odd one's; each lane writes its half of both.
  uint4* const to = reinterpret_cast<uint4*>(row + (channel & ~31)) + is_odd;
  to[0] = is_odd ? give : low;
  to[2] = is_odd ? high : give;
}

}  // namespace kvquant::cuda
