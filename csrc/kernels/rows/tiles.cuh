// What a block of rows_kernel has in shared memory, and how it gets there: the query as operands,
// and tiles of 64 tokens, whose codes come by the copy engine and whose values become fp16.
#pragma once

#include "kernels/attention/combine.cuh"
#include "kernels/rows/config.h"
#include "kernels/rows/wgmma.cuh"

namespace kvquant::cuda {

// kAligned: a lane's channels of every row of the caller's are one access.
template <int kHeadDim, class T, bool kAligned>
struct RowsTraits {
  using Key = Int8;
  using Value = Int8;
  using Element = T;
  static constexpr bool kPlainCall = kAligned;  // RawQuery, write_result
  static constexpr int kQueryLimbs = 2;
  static constexpr int kDim = kHeadDim, kRows = kBlockRows;
  static constexpr InstanceShape kShape = kRowsShape;
  static constexpr int kWarps = kShape.warps, kThreads = kShape.threads();
  static constexpr int kRowsPerWarp = kRows / kWarps;
  static constexpr int kRowSets = 1;  // combine_splits has the registers of all accumulators
  static constexpr int kPartialFloats = partial_floats(kDim, kRows);
  static constexpr int kRotation = kDim;
  static constexpr int kStages = kShape.stages;
};

// The query as operands: the high bytes of all rows, then the low ones.
template <class Traits>
struct RowsQuery {
  static constexpr int kBytes = Traits::kRows * Traits::kDim;
  alignas(1024) uint8_t bytes[Traits::kQueryLimbs][kBytes];

  // Bytes of neighbouring channels from c on. at: limb * kRows + row.
  template <class Bytes>
  __device__ __forceinline__ void put(int at, int c, Bytes x) {
    *reinterpret_cast<Bytes*>(bytes[at / Traits::kRows] + place(at % Traits::kRows, c)) = x;
  }
  // Those of four channels.
  __device__ __forceinline__ uint32_t word(int limb, int row, int c) const {
    return *reinterpret_cast<const uint32_t*>(bytes[limb] + place(row, c));
  }

 private:
  static __device__ __forceinline__ int place(int row, int c) {
    return Swizzle<Traits::kDim>::place(row, c / 16) + c % 16;
  }
};

template <class Traits>
struct RowsShared {
  static constexpr int kDim = Traits::kDim, kStages = Traits::kStages;
  using Codes = uint8_t[kStages][kRowsTile * kDim];

  RowsQuery<Traits> query;
  union {
    struct {
      alignas(1024) Codes k;
      alignas(1024) __half values[kRowsTile * kDim];
      alignas(1024) Codes v;
    };
    struct {
      Codes beside;
      RawQuery<Traits> raw;  // in the place of `values`, until the query is prepared
    };
    float merge[Traits::kRows][kDim + 8];  // at the end: channels, (base, sum)
  };
  alignas(16) AffineParams k_params[kStages][kRowsTile];
  alignas(16) AffineParams v_params[kStages][kRowsTile];
  uint64_t full[kStages];  // barriers: the stage's tile is there
  RowScale scale[Traits::kRows];
  RowView views[Traits::kRows];
  RowTile rows;
};

// Tiles on their way, as a whole where a block of the cache holds them, else in pieces of 16
// tokens. Each warp asks for one piece, or for one of the tile's four parts.
template <class Traits>
class RowsPipeline {
  static constexpr int kDim = Traits::kDim, kPieces = kRowsTile / kTile;
  static_assert(kPieces == Traits::kWarps);

 public:
  __device__ __forceinline__ RowsPipeline(const AttentionCall& p, const CUtensorMap& keys,
                                          const Paging& paging, RowsShared<Traits>& shared,
                                          const RowTile& rows, int end)
      : p_(p), keys_(keys), paging_(paging), shared_(shared), head_(rows.head), end_(end) {
    table_ = p.seqs.block_table + rows.sequence * p.seqs.block_table_stride;
    is_whole_ = paging.shift >= log2_of(kRowsTile);
  }
  // Asks for the first tiles.
  __device__ __forceinline__ void start(int token) {
    ask_entries(token);
#pragma unroll
    for (int i = 0; i < Traits::kStages; ++i) load(token + i * kRowsTile, i);
  }
  // Asks for the tile at `token`, behind the one that was asked for last.
  __device__ __forceinline__ void load(int token, int stage) {
    lost_ <<= kPieces;
    if (token >= end_) return;
    const int block = checked_block(p_.cache, entry_);
    lost_ |= __ballot_sync(kFullWarp, block < 0) & ((1u << kPieces) - 1);
    const int warp = threadIdx.x / 32, piece = is_whole_ ? 0 : warp;
    const int of_piece = __shfl_sync(kFullWarp, max(block, 0), piece);
    if ((threadIdx.x & 31) == 0) copy(token, stage, piece, of_piece, warp);
    __syncwarp();
    ask_entries(token + kRowsTile);
  }
  // Pieces of the oldest tile that have no block: a bit each.
  __device__ __forceinline__ uint32_t lost_pieces() const {
    return lost_ >> kPieces * (Traits::kStages - 1) & ((1u << kPieces) - 1);
  }

 private:
  const AttentionCall& p_;
  const CUtensorMap& keys_;
  const Paging& paging_;
  RowsShared<Traits>& shared_;
  const int32_t* table_;  // of the sequence
  int head_, end_;
  bool is_whole_;
  int entry_;          // of the table, for the tile that is asked for next: that of piece lane % 4
  uint32_t lost_ = 0;  // kPieces bits a tile, the latest lowest

  __device__ __forceinline__ void ask_entries(int token) {
    const int at = token + (threadIdx.x & (kPieces - 1)) * kTile;
    entry_ = load_early(table_ + min(at >> paging_.shift, p_.seqs.max_blocks - 1));
  }
  __device__ __forceinline__ void copy(int token, int stage, int piece, int block, int warp) const {
    const uint32_t barrier = shared_address(&shared_.full[stage]);
    const int first = piece * kTile, row = (token + first) & paging_.mask;
    if (token + first >= end_) return arrive(barrier);
    // A box of keys reaches beyond a block's end, where it has zeros.
    const int box = is_whole_ ? kRowsTile : kTile;
    const int rows = min(box, p_.cache.block_size - row);
    constexpr int kParams = sizeof(AffineParams);
    const auto copy_keys = [&] {
      copy_box(shared_.k[stage] + first * kDim, keys_, row, head_, block, barrier);
    };
    const auto copy_values = [&] {
      copy_bulk(shared_.v[stage] + first * kDim, p_.v_codes.of_head(head_).at(block, row, kDim),
                rows * kDim, barrier);
    };
    const auto copy_params = [&](AffineParams* to, const Strided& from) {
      copy_bulk(to + first, from.of_head(head_).at(block, row, kParams), rows * kParams, barrier);
    };
    if (!is_whole_) {
      expect_bytes(barrier, box * kDim + rows * (kDim + 2 * kParams));
      copy_keys();
      copy_values();
      copy_params(shared_.k_params[stage], p_.k_params);
      copy_params(shared_.v_params[stage], p_.v_params);
    } else if (warp == 0) {
      expect_bytes(barrier, box * kDim);
      copy_keys();
    } else if (warp == 1) {
      expect_bytes(barrier, rows * kDim);
      copy_values();
    } else {
      expect_bytes(barrier, rows * kParams);
      copy_params(warp == 2 ? shared_.k_params[stage] : shared_.v_params[stage],
                  warp == 2 ? p_.k_params : p_.v_params);
    }
  }
};

// A tile's values in fp16: a row a token, of 64 columns; of 128 channels in two halves. A thread
// has 16 neighbouring channels of a row, the first eight for the left half of the columns, so that
// threads that write at once meet different banks.
template <class Traits>
struct RowsValues {
  static constexpr int kDim = Traits::kDim, kPieces = kDim / 16;  // of a row
  static constexpr int kRowsAtOnce = Traits::kThreads / kPieces;
  static constexpr int kHalfBytes = kRowsTile * 128;

  // The channel of column n, a multiple of eight.
  static constexpr int channel(int n) { return n % (kDim / 2) * 2 + n / (kDim / 2) * 8; }

  // Half of a tile, 0 or 1. kChecked: tokens outside [begin, end), those without a block, and rows
  // that are not finite, count as zero.
  template <bool kChecked>
  static __device__ __forceinline__ void convert(RowsShared<Traits>& shared, int stage, int half,
                                                 int token, int begin, int end, uint32_t lost) {
    constexpr int kTurns = kRowsTile / kRowsAtOnce / 2;
    const int tid = threadIdx.x, piece = tid % kPieces;
    int first = tid / kPieces;
    // Of 64 channels, lanes that write at once have rows r and r + 4.
    if constexpr (kDim == 64) first = tid / 32 * 8 + tid / 8 % 4 + (tid & 4);
    uint32_t out[kTurns][8];
    bool is_large = false;
#pragma unroll
    for (int i = 0; i < kTurns; ++i) {
      const int row = (half * kTurns + i) * kRowsAtOnce + first;
      const auto codes = *reinterpret_cast<const uint4*>(shared.v[stage] + row * kDim + piece * 16);
      auto params = *reinterpret_cast<const uint32_t*>(&shared.v_params[stage][row]);
      if constexpr (kChecked) {
        const bool seen = token + row >= begin && token + row < end && !(lost >> row / kTile & 1);
        if (!seen || !(half2_floats(params).x <= kMaxAbs)) params = 0;
      }
      const __half2 scale = bits_half2(__byte_perm(params, 0, 0x1010)),
                    offset = bits_half2(__byte_perm(params, 0, 0x3232)),
                    steps = __float2half2_rn(Traits::Value::kMiddleCode),
                    middle = __hfma2(scale, steps, offset);
      // A code may stand for more than fp16 holds, by less than a step.
      const uint32_t most = half2_bits(__hfma2(scale, steps, __habs2(middle)));
      is_large |= (most & 0x7fffu) == 0x7c00u;
      const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const auto value = [&](uint32_t code) {
          return half2_bits(__hfma2(bits_half2(centered(code)), scale, middle));
        };
        out[i][2 * w] = value(codes_low(words[w]));
        out[i][2 * w + 1] = value(codes_high(words[w]));
      }
    }
    if (is_large) {
      const __half2 most = __float2half2_rn(kMaxAbs);
#pragma unroll
      for (int i = 0; i < kTurns; ++i) {
#pragma unroll
        for (int w = 0; w < 8; ++w) {
          const __half2 x = __hmin2_nan(bits_half2(out[i][w]), most);
          out[i][w] = half2_bits(__hmax2_nan(x, __hneg2(most)));
        }
      }
    }
    uint8_t* const to = reinterpret_cast<uint8_t*>(shared.values);
#pragma unroll
    for (int i = 0; i < kTurns; ++i) {
      const int row = (half * kTurns + i) * kRowsAtOnce + first;
      const int right = kDim == 128 ? kHalfBytes + Swizzle<128>::place(row, piece)
                                    : Swizzle<128>::place(row, piece + kPieces);
      *reinterpret_cast<uint4*>(to + Swizzle<128>::place(row, piece)) =
          make_uint4(out[i][0], out[i][1], out[i][2], out[i][3]);
      *reinterpret_cast<uint4*>(to + right) =
          make_uint4(out[i][4], out[i][5], out[i][6], out[i][7]);
    }
  }

 private:
  static __device__ __forceinline__ __half2 bits_half2(uint32_t u) {
    __half2 h;
    memcpy(&h, &u, 4);
    return h;
  }
};

}  // namespace kvquant::cuda
