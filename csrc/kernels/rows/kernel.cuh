// Attention of many query rows on Hopper: a warpgroup a block, wgmma.
//
// A block takes 32 or 64 query rows (query tokens x heads of one KV head) and one split of the
// tokens, 64 at a time. Their codes come to shared memory by copies that nobody waits for until
// they are needed. Keys meet the query as they are stored, on the integer tensor cores; values are
// dequantized to fp16 in shared memory once a tile. A thread's scores are its weights' operand as
// they are. Several blocks a multiprocessor fill each other's waits.
#pragma once

#include "kernels/attention/combine.cuh"
#include "kernels/rows/config.h"
#include "kernels/rows/wgmma.cuh"

#ifndef KVQ_STAGES
#define KVQ_STAGES 2
#endif
#ifndef KVQ_BLOCKS
#define KVQ_BLOCKS kRowsBlocks
#endif
#ifndef KVQ_HELD
#define KVQ_HELD (kRowCount == 32)
#endif

namespace kvquant::cuda {

template <class Formats, int kHeadDim, int kRowCount, class T, bool kAligned>
struct RowsTraits {
  using Key = typename Formats::Key;
  using Value = typename Formats::Value;
  using Element = T;
  static constexpr bool kPlainCall = kAligned;
  static constexpr int kQueryLimbs = 2;
  static constexpr int kDim = kHeadDim, kRows = kRowCount;
  static constexpr int kWarps = 4, kThreads = 128;
  static constexpr int kRowsPerWarp = kRows / kWarps;
  static constexpr int kRowSets = 1;  // for combine_splits
  static constexpr InstanceShape kShape{1, kWarps, KVQ_BLOCKS, KVQ_STAGES};
  static constexpr int kPartialFloats = partial_floats(kHeadDim, kRowCount);
  static constexpr int kRotation = kDim;
  static constexpr bool kPaired = kRows == 32;  // both bytes of a row are rows of one operand
  static constexpr bool kHeld = KVQ_HELD;       // registers hold the query's high bytes (or both)
  static constexpr int kOwn = kPaired ? 1 : 2;  // rows of a thread
  static constexpr int kStages = KVQ_STAGES;
};

// The query as operands: rows of bytes. kPaired: of each 16 rows, first the high bytes of eight,
// then their low ones; else the low bytes of all rows follow the high ones.
template <class Traits>
struct RowsQuery {
  static constexpr int kOperandBytes = 64 * Traits::kDim;
  alignas(1024) uint8_t bytes[Traits::kPaired ? 1 : 2][kOperandBytes];

  // `at`: row + limb * kRows; neighbouring channels from c on.
  template <class Bytes>
  __device__ __forceinline__ void put(int at, int c, Bytes x) {
    const int limb = at / Traits::kRows, row = at % Traits::kRows;
    const int m = Traits::kPaired ? row / 8 * 16 + limb * 8 + row % 8 : row;
    *reinterpret_cast<Bytes*>(place(Traits::kPaired ? 0 : limb, m, c)) = x;
  }
  __device__ __forceinline__ uint8_t* place(int operand, int m, int c) {
    return bytes[operand] + Swizzle<Traits::kDim>::place(m, c / 16) + c % 16;
  }
  __device__ __forceinline__ uint32_t word(int operand, int m, int c) const {
    return *reinterpret_cast<const uint32_t*>(
        const_cast<RowsQuery*>(this)->place(operand, m, c));
  }
  // Of k-step `step` of 32 channels, of the warp's 16 rows.
  __device__ __forceinline__ uint4 fragment(int operand, int step, int warp, int g, int t) const {
    const int m = warp * 16 + g, c = step * 32 + 4 * t;
    return make_uint4(word(operand, m, c), word(operand, m + 8, c), word(operand, m, c + 16),
                      word(operand, m + 8, c + 16));
  }
};

template <class Traits>
struct RowsShared {
  static constexpr int kDim = Traits::kDim;
  static constexpr int kMergeStride = kDim + 8;  // floats

  RowsQuery<Traits> query;
  union {
    struct {
      alignas(1024) uint8_t k[Traits::kStages][kRowsTile * kDim];
      alignas(1024) __half values[kRowsTile * kDim];  // halves of 64 columns, see convert()
      alignas(1024) uint8_t v[Traits::kStages][kRowsTile * kDim];
    };
    struct {
      alignas(1024) uint8_t unused[Traits::kStages][kRowsTile * kDim];
      RawQuery<Traits> raw;  // until the query is prepared
    };
    float merge[Traits::kRows][kMergeStride];
  };
  alignas(16) uint32_t k_params[Traits::kStages][kRowsTile];
  alignas(16) uint32_t v_params[Traits::kStages][kRowsTile];
  RowScale scale[Traits::kRows];
  RowView views[Traits::kRows];
  RowTile rows;
  alignas(8) uint64_t full[Traits::kStages];
};

// Tokens on their way: copies by the copy engine, of the tile as a whole where a block holds it, or
// of its four pieces of 16 tokens. A warp asks for its piece, or for its part of all.
template <class Traits>
struct RowsPipeline {
  static constexpr int kDim = Traits::kDim;
  using Shared = RowsShared<Traits>;

  const AttentionCall& p;
  const Paging& paging;
  Shared& shared;
  const CUtensorMap* keys;
  const int32_t* table;
  int head, end;
  int entry;          // of the block table, for the tile that is asked for next: piece lane % 4
  uint32_t lost = 0;  // pieces that have no block, four bits a tile, the latest lowest
  bool whole;

  __device__ __forceinline__ RowsPipeline(const AttentionCall& p, const CUtensorMap* keys,
                                          const Paging& paging, Shared& shared,
                                          const RowTile& rows, int end, int first)
      : p(p), paging(paging), shared(shared), keys(keys), head(rows.head), end(end) {
    table = p.seqs.block_table + rows.sequence * p.seqs.block_table_stride;
    whole = paging.shift >= 6;
    ask_entry(first);
  }
  __device__ __forceinline__ void ask_entry(int token) {
    const int at = token + (threadIdx.x & 3) * 16;
    entry = load_early(table + min(at >> paging.shift, p.seqs.max_blocks - 1));
  }
  __device__ __forceinline__ void load(int token, int stage) {
    if (token < end) {
      const int block = checked_block(p.cache, entry);
      lost = lost << 4 | (__ballot_sync(kFullWarp, block < 0) & 15u);
      const int warp = threadIdx.x / 32;
      const int mine = __shfl_sync(kFullWarp, max(block, 0), whole ? 0 : warp);
      if ((threadIdx.x & 31) == 0) {
        const uint32_t bar = shared_at(&shared.full[stage]);
        const int at = whole ? token : token + 16 * warp, first = whole ? 0 : 16 * warp;
        const int row = at & paging.mask;
        const bool there = at < end;
        const int rows = whole ? min(64, p.cache.block_size - row) : 16;
        const int k_bytes = whole ? 64 * kDim : 16 * kDim;
        const auto k_copy = [&] {
          copy_tensor(shared_at(shared.k[stage]) + first * kDim, keys, bar, row, head, mine);
        };
        const auto v_copy = [&] {
          copy_bulk(shared_at(shared.v[stage]) + first * kDim,
                    p.v_codes.at(mine, head, row, kDim),
                    rows * kDim, bar);
        };
        const auto k_params = [&] {
          copy_bulk(shared_at(shared.k_params[stage] + first),
                    p.k_params.at(mine, head, row, 4), rows * 4, bar);
        };
        const auto v_params = [&] {
          copy_bulk(shared_at(shared.v_params[stage] + first),
                    p.v_params.at(mine, head, row, 4), rows * 4, bar);
        };
        if (whole) {
          if (warp == 0) expect_bytes(bar, k_bytes), k_copy();
          if (warp == 1) expect_bytes(bar, rows * kDim), v_copy();
          if (warp == 2) expect_bytes(bar, rows * 4), k_params();
          if (warp == 3) expect_bytes(bar, rows * 4), v_params();
        } else if (there) {
          expect_bytes(bar, k_bytes + rows * (kDim + 8));
          k_copy(), v_copy(), k_params(), v_params();
        } else {
          arrive(bar);
        }
      }
      __syncwarp();
      ask_entry(token + kRowsTile);
    } else {
      lost <<= 4;
    }
  }
  // Of the oldest tile of those that are asked for.
  __device__ __forceinline__ uint32_t lost_pieces() const {
    return lost >> 4 * (Traits::kStages - 1) & 15u;
  }
};

// Values of a tile, to fp16: column n of row (token) j is channel channel(n). A thread has 16
// neighbouring channels: eight go to each half, so that threads that write at once meet different
// banks. part: of two.
template <class Traits>
struct RowsValues {
  static constexpr int kDim = Traits::kDim;
  static constexpr int kRowThreads = kDim / 16, kRowsAtOnce = 128 / kRowThreads;
  static constexpr int kHalfBytes = kRowsTile * 128;

  static constexpr int column_channel(int n) {  // of the columns n .. n + 7
    return kDim == 128 ? n % 64 / 8 * 16 + n / 64 * 8 : n % 32 / 8 * 16 + n / 32 * 8;
  }
  // kChecked: tokens outside [begin, end) and those without a block count as zero, and so do rows
  // that are not finite.
  template <bool kChecked>
  static __device__ __forceinline__ void convert(RowsShared<Traits>& shared, int stage, int part, int token, int begin, int end,
                                                 uint32_t lost) {
    const int tid = threadIdx.x;
    int row, piece;
    if constexpr (kDim == 128) {
      row = tid >> 3, piece = tid & 7;
    } else {  // lanes that write at once have rows r and r + 4
      row = (tid >> 5) * 8 + (tid >> 3 & 3) + (tid & 4), piece = tid & 3;
    }
    constexpr int kSteps = kRowsTile / kRowsAtOnce / 2;
    uint32_t out[kSteps][8];
    bool large = false;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const int j = (part * kSteps + i) * kRowsAtOnce + row;
      const uint4 codes = *reinterpret_cast<const uint4*>(shared.v[stage] + j * kDim + piece * 16);
      uint32_t params = shared.v_params[stage][j];
      if constexpr (kChecked) {
        const bool seen = token + j >= begin && token + j < end && !(lost >> j / 16 & 1);
        if (!seen || !(half2_floats(params).x <= kMaxAbs)) params = 0;
      }
      const __half2 scale = bits_half2(__byte_perm(params, 0, 0x1010)),
                    offset = bits_half2(__byte_perm(params, 0, 0x3232)),
                    middle = __hfma2(scale, __float2half2_rn(128.f), offset);
      // Codes may reach beyond the rows they came from, and those to the end of fp16.
      const __half2 most = __hfma2(scale, __float2half2_rn(128.f), __habs2(middle));
      large |= (half2_bits(most) & 0x7fffu) == 0x7c00u;
      const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const uint32_t low = centered(codes_low(words[w])), high = centered(codes_high(words[w]));
        out[i][2 * w] = half2_bits(__hfma2(bits_half2(low), scale, middle));
        out[i][2 * w + 1] = half2_bits(__hfma2(bits_half2(high), scale, middle));
      }
    }
    if (large) {
      const __half2 most = __float2half2_rn(kMaxAbs);
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
#pragma unroll
        for (int w = 0; w < 8; ++w) {
          const __half2 x = bits_half2(out[i][w]);
          out[i][w] = half2_bits(__hmax2_nan(__hmin2_nan(x, most), __hneg2(most)));
        }
      }
    }
    uint8_t* const to = reinterpret_cast<uint8_t*>(shared.values);
    constexpr int kOther = kDim == 128 ? 0 : 4;  // piece of the second eight, or half
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const int j = (part * kSteps + i) * kRowsAtOnce + row;
      *reinterpret_cast<uint4*>(to + Swizzle<128>::place(j, piece)) =
          make_uint4(out[i][0], out[i][1], out[i][2], out[i][3]);
      *reinterpret_cast<uint4*>(to + (kDim == 128 ? kHalfBytes : 0) +
                                Swizzle<128>::place(j, piece + kOther)) =
          make_uint4(out[i][4], out[i][5], out[i][6], out[i][7]);
    }
  }
  static __device__ __forceinline__ __half2 bits_half2(uint32_t u) {
    __half2 h;
    memcpy(&h, &u, 4);
    return h;
  }
};

// Products of this warp's rows with the means of eight groups, for the thread's own rows.
template <class Traits>
struct RowsMeans {
  float dot[Traits::kOwn][2] = {};  // groups 2 t, 2 t + 1 of the eight
  int first = -8;                   // of them

  __device__ __forceinline__ void find(const AttentionCall& p, const RowTile& rows,
                                       const Paging& paging, const RowsQuery<Traits>& query,
                                       int first, int last, int warp, int g, int t) {
    this->first = first;
    const int index = first + g;
    int block = -1;
    if (index <= last) {
      block = block_of(p.cache, p.seqs, rows.sequence, index << paging.group_shift >> paging.shift);
    }
    const __half* const mean =
        rows_of<__half>(p.cache.mean, max(block, 0), rows.head) +
        int64_t((index << paging.group_shift & paging.mask) >> paging.group_shift) * Traits::kDim +
        4 * t;
    uint2 x[Traits::kDim / 16];
#pragma unroll
    for (int i = 0; i < Traits::kDim / 16; ++i) {
      x[i] = block >= 0 ? load_keep<uint2>(mean + 16 * i) : make_uint2(0, 0);
    }
    float c[2][4] = {};
#pragma unroll
    for (int i = 0; i < Traits::kDim / 16; ++i) {
#pragma unroll
      for (int limb = 0; limb < (Traits::kPaired ? 1 : 2); ++limb) {
        const uint32_t low = query.word(limb, warp * 16 + g, 16 * i + 4 * t) ^ 0x80808080u,
                       high = query.word(limb, warp * 16 + g + 8, 16 * i + 4 * t) ^ 0x80808080u;
        mma_16816(c[limb],
                  make_uint4(centered(codes_low(low)), centered(codes_low(high)),
                             centered(codes_high(low)), centered(codes_high(high))),
                  x[i].x, x[i].y);
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if constexpr (Traits::kPaired) {
        dot[0][i] = fmaf(256.f, c[0][i], c[0][2 + i]);
      } else {
        dot[0][i] = fmaf(256.f, c[0][i], c[1][i]);
        dot[1][i] = fmaf(256.f, c[0][2 + i], c[1][2 + i]);
      }
    }
  }
  __device__ __forceinline__ float of(int own, int group) const {
    const int at = group - first;
    return __shfl_sync(kFullWarp, at & 1 ? dot[own][1] : dot[own][0],
                       (threadIdx.x & 28) | (at >> 1));
  }
};

// Softcap, ALiBi and the mask on the scores y of a tile, which become those times gain. Those of
// rows that see a token whose value is not finite become NaN.
template <class Traits>
__device__ __forceinline__ void mask_rows(const AttentionCall& p, const RowsShared<Traits>& shared,
                                          int token, int stage, uint32_t lost, int row, int t,
                                          const float (&gain)[Traits::kOwn],
                                          float (&y)[Traits::kOwn][kRowsTile / 4]) {
  const float cap = p.softcap * kLog2e;
  RowView view[Traits::kOwn];
#pragma unroll
  for (int r = 0; r < Traits::kOwn; ++r) view[r] = shared.views[row + 8 * r];
#pragma unroll
  for (int i = 0; i < kRowsTile / 4; ++i) {
    const int at = i / 2 * 8 + 2 * t + i % 2, j = token + at;
    const bool usable = half2_floats(shared.v_params[stage][at]).x <= kMaxAbs;
    const bool there = !(lost >> at / 16 & 1);
#pragma unroll
    for (int r = 0; r < Traits::kOwn; ++r) {
      float s = y[r][i] * gain[r];
      if (p.softcap > 0.f) s = cap * tanh_approx(s * __frcp_rn(cap));
      s -= view[r].slope * fabsf(float(view[r].position - j));
      if (!usable) s = NAN;
      if (j < view[r].begin || j >= view[r].end || !there) s = -INFINITY;
      y[r][i] = s;
    }
  }
}

// A block's part of a unit's tokens. Blocks of a cluster have neighbouring splits and add up what
// they have; the last cluster of the grid adds what the others left, and so takes a sequence's last
// splits, however many it has.
struct Share {
  int rank, size;         // of this block in its cluster; of this one
  int cluster, others;    // of the unit; those before the last that have tokens
  int split;
  bool combines, has_tokens, is_none;

  __device__ __forceinline__ Share(const AttentionCall& p, int span, int length) {
    size = p.cluster;
    cluster = blockIdx.z / size, rank = blockIdx.z - cluster * size;
    const int splits = (span + length - 1) / length, before = max(0, splits - size);
    others = (before + size - 1) / size;
    combines = int(blockIdx.z) >= int(gridDim.z) - size;
    is_none = !combines && cluster >= others;
    split = (combines ? before : cluster * size) + rank;
    has_tokens = split < (combines ? splits : before);
  }
};

// A row's sum over the blocks of the cluster, in their order.
template <class Traits>
__device__ __forceinline__ RowResult<Traits> combine_cluster(const RowsShared<Traits>& shared,
                                                             int row, int size) {
  using Row = WarpRow<Traits::kDim>;
  const uint32_t at = shared_at(shared.merge[row]);
  const int lane = threadIdx.x & 31;
  float y[kMostCluster][Row::kCount], own[2] = {kNoScore, 0.f};
#pragma unroll
  for (int s = 0; s < kMostCluster; ++s) {
    Row::pieces([&](auto width, int i, int c) {
      if (s < size) {
        load_of_block<width()>(at + 4 * c, s, &y[s][i]);
      } else {
#pragma unroll
        for (int j = 0; j < width(); ++j) y[s][i + j] = 0.f;
      }
    });
  }
  if (lane < size) load_of_block<2>(at + 4 * Traits::kDim, lane, own);
  RowResult<Traits> all{};
  all.max = warp_max(own[0]);
  const float weighs = exp2_approx(own[0] - all.max);
  float sum = __fmul_rn(weighs, own[1]);
#pragma unroll
  for (int step = 1; step < kMostCluster; step <<= 1) sum += __shfl_xor_sync(kFullWarp, sum, step);
  all.sum = __shfl_sync(kFullWarp, sum, 0);
#pragma unroll
  for (int s = 0; s < kMostCluster; ++s) {
    const float weight = __shfl_sync(kFullWarp, weighs, s);
#pragma unroll
    for (int i = 0; i < Row::kCount; ++i) all.x[i] = fmaf(weight, y[s][i], all.x[i]);
  }
  return all;
}

// grid: (row tiles x KV heads, sequences, splits), as attention_kernel's; clusters of splits.
template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kShape.blocks)
    rows_kernel(const __grid_constant__ AttentionCall p, const __grid_constant__ CUtensorMap keys) {
  constexpr int kDim = Traits::kDim, kOwn = Traits::kOwn, kStages = Traits::kStages;
  constexpr int kSteps = kDim / 32;
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& shared = *reinterpret_cast<RowsShared<Traits>*>(memory);
  const int tid = threadIdx.x, g = (tid & 31) >> 2, t = tid & 3;
  const int warp = __shfl_sync(kFullWarp, tid / 32, 0);
  const int sequence = blockIdx.y;
  int head = blockIdx.x, row_tile = 0;
  if (p.row_tiles > 1) {
    head = blockIdx.x / p.row_tiles;
    row_tile = p.row_tiles - 1 - int(blockIdx.x % p.row_tiles);  // those that see most are first
  }
  wait_for_previous_launch();
  RowTile rows;
  if (!rows.find_rows(p, sequence, head, row_tile, Traits::kRows)) return;
  const int asked_length = load_early(p.seqs.seq_lens + rows.sequence);
  shared.raw.ask(p, rows, warp);
  close_copies();
  const Paging paging(p.cache, p.seqs.max_blocks);
  rows.find_tokens(p, uniform(asked_length));
  rows.begin &= -kRowsTile;
  const int span = rows.end - rows.begin;
  int length = p.divided_by.divide(span + p.splits - 1);
  length = max(p.min_split, (length + kRowsTile - 1) / kRowsTile * kRowsTile);
  const Share share(p, span, length);
  if (share.is_none) {  // and so is its cluster's
    wait_copies<0>(0);
    return;
  }
  const int begin = rows.begin + share.split * length;
  const int end = share.has_tokens ? min(rows.end, begin + length) : begin;
  if (tid == 0) {
    for (int i = 0; i < kStages; ++i) init_barrier(shared_at(&shared.full[i]), Traits::kWarps);
    fence_barriers();
  }
  __syncthreads();
  RowsPipeline<Traits> pipeline(p, &keys, paging, shared, rows, end, begin);
#pragma unroll
  for (int i = 0; i < kStages; ++i) pipeline.load(begin + i * kRowsTile, i);
  if (tid == 0) shared.rows = rows;
  if (tid < Traits::kRows) shared.views[tid] = rows.view(p, tid);
  wait_copies<0>(0);
  if (begin < end) {
    prepare_query(p, shared.raw, warp, rows.count, shared.query, shared.scale);
  }
  fence_for_products();
  __syncthreads();

  const int own_row = Traits::kPaired ? warp * 8 + g : warp * 16 + g;
  float gain[kOwn], sum_q[kOwn], base[kOwn], total[kOwn];
#pragma unroll
  for (int r = 0; r < kOwn; ++r) {
    const RowScale scale = shared.scale[own_row + 8 * r];
    gain[r] = scale.gain, sum_q[r] = scale.sum;
    base[r] = kNoScore, total[r] = 0.f;
  }
  uint4 held[Traits::kHeld ? kSteps : 1];
  if constexpr (Traits::kHeld) {
#pragma unroll
    for (int s = 0; s < kSteps; ++s) held[s] = shared.query.fragment(0, s, warp, g, t);
  }
  float out[kDim / 2];
#pragma unroll
  for (int i = 0; i < kDim / 2; ++i) out[i] = 0.f;
  RowsMeans<Traits> means;
  const int last_group = (end - 1) >> paging.group_shift;
  const int first_stored = max(rows.begin, rows.start);
  const bool plain = p.softcap == 0.f && !p.alibi_slopes;
  const int clean_begin = plain ? rows.all_begin : 1 << 30, clean_end = rows.all_end - kRowsTile;
  const uint64_t q_at = Swizzle<kDim>::descriptor(shared_at(shared.query.bytes[0])),
                 k_at = Swizzle<kDim>::descriptor(shared_at(shared.k[0])),
                 v_at = Swizzle<128>::descriptor(shared_at(shared.values),
                                                 RowsValues<Traits>::kHalfBytes);
  int stage = 0;
  uint32_t phase = 0;
  int c[32];
  const auto k_stage = [&](int stage) { return k_at + ((stage * kRowsTile * kDim) >> 4); };
  const auto multiply_high = [&](uint64_t keys) {
    begin_products();
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      if constexpr (Traits::kHeld) {
        multiply_bytes(c, held[s], keys + 2 * s, s > 0);
      } else {
        multiply_bytes(c, q_at + 2 * s, keys + 2 * s, s > 0);
      }
    }
    close_products();
  };
  if (begin < end) wait_barrier(shared_at(&shared.full[0]), 0);
  multiply_high(k_stage(0));
  wait_products<0>();
  keep(c);
#pragma unroll 1
  for (int token = begin; token < end; token += kRowsTile) {
    __syncthreads();  // nobody reads the last tile's values any more
    const uint32_t lost = pipeline.lost_pieces();
    const bool clean = token >= clean_begin && token <= clean_end && !lost;
    if constexpr (!Traits::kPaired) {
#pragma unroll
      for (int i = 0; i < 32; ++i) c[i] *= 256;
      begin_products();
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        multiply_bytes(c, q_at + ((64 * kDim) >> 4) + 2 * s, k_stage(stage) + 2 * s, 1);
      }
      close_products();
    }
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      if (clean) {
        RowsValues<Traits>::template convert<false>(shared, stage, part, 0, 0, 0, 0);
      } else {
        RowsValues<Traits>::template convert<true>(shared, stage, part, token, first_stored, end,
                                                   lost);
      }
    }
    if (paging.group_shift < 31 && (token >> paging.group_shift) - means.first >= 8) {
      means.find(p, rows, paging, shared.query, token >> paging.group_shift, last_group, warp, g,
                 t);
    }
    if constexpr (!Traits::kPaired) {
      wait_products<0>();
      keep(c);
    }
    // y: scores / gain, of the thread's own rows, tokens 8 i + 2 t + e.
    float y[kOwn][kRowsTile / 4];
    {
      float dot[kOwn];
#pragma unroll
      for (int r = 0; r < kOwn; ++r) {
        dot[r] = paging.group_shift < 31 ? means.of(r, token >> paging.group_shift) : 0.f;
      }
      const uint32_t* const params = shared.k_params[stage] + 2 * t;
#pragma unroll
      for (int i = 0; i < kRowsTile / 8; ++i) {
        const uint2 words = *reinterpret_cast<const uint2*>(params + 8 * i);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float2 affine = half2_floats(e ? words.y : words.x);
#pragma unroll
          for (int r = 0; r < kOwn; ++r) {
            const int x =
                Traits::kPaired ? 256 * c[4 * i + e] + c[4 * i + 2 + e] : c[4 * i + 2 * r + e];
            y[r][2 * i + e] = fmaf(affine.x, float(x), fmaf(affine.y, sum_q[r], dot[r]));
          }
        }
      }
    }
    float by[kOwn];
#pragma unroll
    for (int r = 0; r < kOwn; ++r) by[r] = gain[r];
    if (!clean) {
      mask_rows(p, shared, token, stage, lost, own_row, t, gain, y);
#pragma unroll
      for (int r = 0; r < kOwn; ++r) by[r] = 1.f;
    }
    // Weights, with bases that follow larger scores only where halves would not hold them: the sum
    // of a thread's, which is needed anyway, tells.
    constexpr float kRaise = 7.f, kMostSum = 32768.f;
    uint32_t weight[kRowsTile / 8][kOwn];  // halves of pieces of 8 tokens
    float sum[kOwn];
    const auto weigh = [&] {
#pragma unroll
      for (int r = 0; r < kOwn; ++r) {
        float part[2] = {};
#pragma unroll
        for (int i = 0; i < kRowsTile / 8; ++i) {
          const float p0 = exp2_approx(fmaf(y[r][2 * i], by[r], -base[r])),
                      p1 = exp2_approx(fmaf(y[r][2 * i + 1], by[r], -base[r]));
          part[0] += p0, part[1] += p1;
          weight[i][r] = half2_bits(__floats2half2_rn(p0, p1));
        }
        sum[r] = part[0] + part[1];
      }
    };
    weigh();
    bool grows = sum[0] > kMostSum;
    if constexpr (kOwn > 1) grows |= sum[kOwn - 1] > kMostSum;
    if (__any_sync(kFullWarp, grows)) {
      float best[kOwn];
#pragma unroll
      for (int r = 0; r < kOwn; ++r) {
        best[r] = y[r][0];
#pragma unroll
        for (int i = 1; i < kRowsTile / 4; ++i) best[r] = fmaxf(best[r], y[r][i]);
        best[r] *= by[r];
      }
      reduce_rows(best);
#pragma unroll
      for (int r = 0; r < kOwn; ++r) {
        const float now = fmaxf(base[r], best[r] - kRaise), shrink = exp2_approx(base[r] - now);
        base[r] = now;
        total[r] *= shrink;
#pragma unroll
        for (int i = 0; i < kDim / 8; ++i) {
          out[4 * i + 2 * r] *= shrink;
          out[4 * i + 2 * r + 1] *= shrink;
        }
      }
      weigh();
    }
#pragma unroll
    for (int r = 0; r < kOwn; ++r) total[r] += sum[r];
    fence_for_products();
    __syncthreads();
    keep(out);
    begin_products();
#pragma unroll
    for (int i = 0; i < kRowsTile / 16; ++i) {
      const auto word = [&](int half, int r) { return r < kOwn ? weight[2 * i + half][r] : 0u; };
      multiply_halves(out, make_uint4(word(0, 0), word(0, 1), word(1, 0), word(1, 1)),
                      v_at + i * 128);
    }
    close_products();
    const int used = stage;
    if (stage + 1 == kStages) phase ^= 1;
    stage = stage + 1 == kStages ? 0 : stage + 1;
    if (token + kRowsTile < end) wait_barrier(shared_at(&shared.full[stage]), phase);
    multiply_high(k_stage(stage));  // of the next tile; the last one's are not used
    pipeline.load(token + kStages * kRowsTile, used);
    wait_products<0>();
    keep(out);
    keep(c);
  }
  __syncthreads();
  // Each warp leaves its rows, and the cluster's blocks share all of them out.
#pragma unroll
  for (int r = 0; r < kOwn; ++r) {
    float sum = total[r];
    sum += __shfl_xor_sync(kFullWarp, sum, 1);
    sum += __shfl_xor_sync(kFullWarp, sum, 2);
    float* const to = shared.merge[own_row + 8 * r];
#pragma unroll
    for (int i = 0; i < kDim / 8; ++i) {
      *reinterpret_cast<float2*>(to + RowsValues<Traits>::column_channel(8 * i) + 2 * t) =
          make_float2(out[4 * i + 2 * r], out[4 * i + 2 * r + 1]);
    }
    if (t == 0) *reinterpret_cast<float2*>(to + kDim) = make_float2(base[r], sum);
  }
  wait_for_cluster();
  const int64_t unit = int64_t(sequence) * gridDim.x + head * p.row_tiles + row_tile;
  const Partial<Traits> partial{p.partial + unit * p.splits * Traits::kPartialFloats};
#pragma unroll 1
  for (int row = share.rank * Traits::kWarps + warp; row < shared.rows.count;
       row += share.size * Traits::kWarps) {
    RowResult<Traits> result = combine_cluster(shared, row, share.size);
    if (share.combines) {
      combine_splits(partial, share.others, row, result);
      write_result(p, shared.rows, row, result);
    } else {
      store_partial(partial, share.cluster, row, result);
    }
  }
  wait_for_cluster();  // others may read this block's rows
}

}  // namespace kvquant::cuda
