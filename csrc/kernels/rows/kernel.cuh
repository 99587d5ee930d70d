// Attention of many query rows on Hopper, by the products of a warpgroup (wgmma).
//
// A block takes 64 query rows (query tokens x heads of one KV head) and one split of the tokens, 64
// at a time. Keys meet the query as they are stored, on the integer tensor cores, first with its
// high bytes, then with its low ones; values become fp16 in shared memory, once a tile. A thread's
// scores are its weights' operand as they are. Blocks of a multiprocessor fill each other's waits.
#pragma once

#include "kernels/rows/tiles.cuh"

namespace kvquant::cuda {

// A thread's scores of a tile: its two rows, g and g + 8 of the warp's 16, and of each eight tokens
// the two from 2 t on.
using RowScores = float[2][kRowsTile / 4];

// Products of a thread's rows with the means of eight groups, found by its warp.
template <class Traits>
class RowsMeans {
 public:
  // Of the group at `token`; all lanes must call. last: the last group that is wanted.
  __device__ __forceinline__ void of(const AttentionCall& p, const RowTile& rows,
                                     const Paging& paging, const RowsQuery<Traits>& query,
                                     int token, int last, int warp, float (&dot)[2]) {
    dot[0] = dot[1] = 0.f;
    if (!p.cache.mean_group) return;
    const int group = token >> paging.group_shift;
    if (group - first_ >= kMeanGroups) find(p, rows, paging, query, group, last, warp);
    const int at = group - first_, from = (threadIdx.x & 28) + at / 2;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      dot[r] = __shfl_sync(kFullWarp, at % 2 ? dots_[r][1] : dots_[r][0], from);
    }
  }

 private:
  float dots_[2][2] = {};     // groups 2 t and 2 t + 1 of the eight
  int first_ = -kMeanGroups;  // of them

  // Groups whose block is lost count as zero.
  __device__ __forceinline__ void find(const AttentionCall& p, const RowTile& rows,
                                       const Paging& paging, const RowsQuery<Traits>& query,
                                       int first, int last, int warp) {
    constexpr int kSteps = Traits::kDim / 16;
    const int g = (threadIdx.x & 31) >> 2, t = threadIdx.x & 3;
    first_ = first;
    const __half* mean = nullptr;
    if (first + g <= last) {
      mean = mean_of<__half>(p.cache, p.seqs, paging, rows.sequence, rows.head,
                             (first + g) << paging.group_shift);
    }
    uint2 x[kSteps];
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      x[i] = mean ? load_keep<uint2>(mean + 16 * i + 4 * t) : make_uint2(0, 0);
    }
    float c[2][4] = {};
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
#pragma unroll
      for (int limb = 0; limb < 2; ++limb) {
        const int row = warp * 16 + g, channel = 16 * i + 4 * t;
        // Signed bytes, to fp16.
        const uint32_t a = query.word(limb, row, channel) ^ 0x80808080u,
                       b = query.word(limb, row + 8, channel) ^ 0x80808080u;
        mma_16816(c[limb],
                  make_uint4(centered(codes_low(a)), centered(codes_low(b)),
                             centered(codes_high(a)), centered(codes_high(b))),
                  x[i].x, x[i].y);
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) dots_[i / 2][i % 2] = fmaf(256.f, c[0][i], c[1][i]);
  }
};

// Softcap, ALiBi and the mask on a tile's scores over gain, which become scores. Those of rows that
// see a token whose value is not finite become NaN.
template <class Traits>
__device__ __forceinline__ void mask_rows(const AttentionCall& p, const RowsShared<Traits>& shared,
                                          int token, int stage, uint32_t lost, int row, int t,
                                          const float (&gain)[2], RowScores& y) {
  const float cap = p.softcap * kLog2e, inverse = __frcp_rn(cap);
  const RowView views[2] = {shared.views[row], shared.views[row + 8]};
#pragma unroll
  for (int i = 0; i < kRowsTile / 4; ++i) {
    const int at = i / 2 * 8 + 2 * t + i % 2, j = token + at;
    const bool is_there = !(lost >> at / kTile & 1);
    const bool is_finite = half_to_float(shared.v_params[stage][at].scale) <= kMaxAbs;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float s = y[r][i] * gain[r];
      if (p.softcap > 0.f) s = cap * tanh_approx(s * inverse);
      s -= views[r].slope * fabsf(float(views[r].position - j));
      if (!is_finite) s = NAN;
      if (j < views[r].begin || j >= views[r].end || !is_there) s = -INFINITY;
      y[r][i] = s;
    }
  }
}

// The running softmax of a thread's rows, and their sums of weighted values.
template <class Traits>
class RowsAccumulator {
  static constexpr int kDim = Traits::kDim;
  // Weights carry 2^kRaise when a base moves, so that small ones are no subnormals. Bases follow
  // larger scores only where fp16 might not hold the weights: the sum of a thread's weights, which
  // is needed anyway, tells.
  static constexpr float kRaise = 7.f, kMostSum = 0x1p15f;

 public:
  // Weights of a tile: exp2(y by - base), in halves as the product takes them.
  __device__ __forceinline__ void weigh(const RowScores& y, const float (&by)[2]) {
    float sum[2];
    weigh_once(y, by, sum);
    if (__any_sync(kFullWarp, sum[0] > kMostSum || sum[1] > kMostSum)) {
      rescale(y, by);
      weigh_once(y, by, sum);
    }
    total_[0] += sum[0], total_[1] += sum[1];
  }
  // Adds the tile's values, which all threads have written; not waited for.
  __device__ __forceinline__ void add(uint64_t values) {
    keep(out_);
    begin_products();
#pragma unroll
    for (int i = 0; i < kRowsTile / 16; ++i) {
      const auto& a = weights_[2 * i];
      const auto& b = weights_[2 * i + 1];
      multiply_halves(out_, make_uint4(a[0], a[1], b[0], b[1]), values + i * (16 * 128 >> 4));
    }
    close_products();
  }
  __device__ __forceinline__ void wait() {
    wait_products<0>();
    keep(out_);
  }
  // Leaves the rows in shared memory.
  __device__ __forceinline__ void leave(RowsShared<Traits>& shared, int row, int t) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float sum = total_[r];
      sum += __shfl_xor_sync(kFullWarp, sum, 1);
      sum += __shfl_xor_sync(kFullWarp, sum, 2);
      float* const to = shared.merge[row + 8 * r];
#pragma unroll
      for (int i = 0; i < kDim / 8; ++i) {
        *reinterpret_cast<float2*>(to + RowsValues<Traits>::channel(8 * i) + 2 * t) =
            make_float2(out_[4 * i + 2 * r], out_[4 * i + 2 * r + 1]);
      }
      if (t == 0) *reinterpret_cast<float2*>(to + kDim) = make_float2(base_[r], sum);
    }
  }

 private:
  float out_[kDim / 2] = {};
  float base_[2] = {kNoScore, kNoScore}, total_[2] = {};
  uint32_t weights_[kRowsTile / 8][2];  // of each eight tokens, of each row

  __device__ __forceinline__ void weigh_once(const RowScores& y, const float (&by)[2],
                                             float (&sum)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float parts[2] = {};
#pragma unroll
      for (int i = 0; i < kRowsTile / 8; ++i) {
        const float a = exp2_approx(fmaf(y[r][2 * i], by[r], -base_[r])),
                    b = exp2_approx(fmaf(y[r][2 * i + 1], by[r], -base_[r]));
        parts[0] += a, parts[1] += b;
        weights_[i][r] = half2_bits(__floats2half2_rn(a, b));
      }
      sum[r] = parts[0] + parts[1];
    }
  }
  __device__ __forceinline__ void rescale(const RowScores& y, const float (&by)[2]) {
    float best[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      best[r] = y[r][0];
#pragma unroll
      for (int i = 1; i < kRowsTile / 4; ++i) best[r] = fmaxf(best[r], y[r][i]);
      best[r] *= by[r];
    }
    reduce_rows(best);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float base = fmaxf(base_[r], best[r] - kRaise);
      const float shrink = exp2_approx(base_[r] - base);
      base_[r] = base;
      total_[r] *= shrink;
#pragma unroll
      for (int i = 0; i < kDim / 8; ++i) {
        out_[4 * i + 2 * r] *= shrink;
        out_[4 * i + 2 * r + 1] *= shrink;
      }
    }
  }
};

// Writes the block's rows, or leaves them for the unit's last split: a warp takes its own in turn.
template <class Traits>
__device__ __forceinline__ void finish_rows(const AttentionCall& p,
                                            const RowsShared<Traits>& shared, int64_t unit,
                                            int split, bool combines, int warp) {
  const Partial<Traits> partial{p.partial + unit * p.splits * Traits::kPartialFloats};
  const int end = min(shared.rows.count, (warp + 1) * Traits::kRowsPerWarp);
#pragma unroll 1
  for (int row = warp * Traits::kRowsPerWarp; row < end; ++row) {
    const float* const from = shared.merge[row];
    RowResult<Traits> result;
    WarpRow<Traits::kDim>::pieces([&](auto width, int i, int c) {
#pragma unroll
      for (int j = 0; j < width(); ++j) result.x[i + j] = from[c + j];
    });
    result.max = from[Traits::kDim], result.sum = from[Traits::kDim + 1];
    if (!combines) {
      store_partial(partial, split, row, result);
    } else {
      combine_splits(partial, split, row, result);
      write_result(p, shared.rows, row, result);
    }
  }
}

// grid: (row tiles x KV heads, sequences, splits), as attention_kernel's. keys: their codes, in
// boxes of a tile's or of a piece's rows.
template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kShape.blocks)
    rows_kernel(const __grid_constant__ AttentionCall p, const __grid_constant__ CUtensorMap keys) {
  constexpr int kDim = Traits::kDim, kStages = Traits::kStages;
  using Values = RowsValues<Traits>;
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& shared = *reinterpret_cast<RowsShared<Traits>*>(memory);
  const int warp = uniform(threadIdx.x / 32), g = (threadIdx.x & 31) >> 2, t = threadIdx.x & 3;
  const int sequence = blockIdx.y, head = blockIdx.x / p.row_tiles;
  const int row_tile = p.row_tiles - 1 - int(blockIdx.x % p.row_tiles);  // the longest are first
  wait_for_previous_launch();
  RowTile rows;
  if (!rows.find_rows(p, sequence, head, row_tile, Traits::kRows)) return;
  const int asked_length = load_early(p.seqs.seq_lens + rows.sequence);
  shared.raw.ask(p, rows, warp);
  close_copies();
  const Paging paging(p.cache, p.seqs.max_blocks);
  rows.find_tokens(p, uniform(asked_length));
  rows.begin &= -kRowsTile;
  const int span = rows.end - rows.begin, length = rows.split_length(p, kRowsTile);
  // As attention_kernel's: the last split is in the last layer, whichever it is.
  const bool combines = blockIdx.z == gridDim.z - 1;
  int split = blockIdx.z;
  if (combines) {
    split = gridDim.z > 1 && span > 0 ? (span - 1) / length : 0;
  } else if ((split + 1) * length >= span) {
    return wait_copies<0>(0);
  }
  const int begin = rows.begin + split * length, end = min(rows.end, begin + length);
  if (threadIdx.x == 0) {
#pragma unroll
    for (int i = 0; i < kStages; ++i) {
      init_barrier(shared_address(&shared.full[i]), Traits::kWarps);
    }
    publish_barriers();
    shared.rows = rows;
  }
  __syncthreads();
  RowsPipeline<Traits> pipeline(p, keys, paging, shared, rows, end);
  if (begin < end) pipeline.start(begin);
  if (threadIdx.x < Traits::kRows) shared.views[threadIdx.x] = rows.view(p, threadIdx.x);
  wait_copies<0>(0);
  prepare_query(p, shared.raw, warp, rows.count, shared.query, shared.scale);
  publish_shared();
  __syncthreads();

  const int row = warp * 16 + g;  // this thread's first one; the other is eight further
  const RowScale scales[2] = {shared.scale[row], shared.scale[row + 8]};
  const float gain[2] = {scales[0].gain, scales[1].gain};
  RowsAccumulator<Traits> acc;
  RowsMeans<Traits> means;
  const int last_group = (end - 1) >> paging.group_shift;
  const int first_stored = max(rows.begin, rows.start);
  // Tiles between them need no look at single scores.
  const int clean_begin = p.softcap == 0.f && !p.alibi_slopes ? rows.all_begin : 1 << 30;
  const int clean_end = rows.all_end - kRowsTile;
  const uint64_t high = Swizzle<kDim>::descriptor(shared_address(shared.query.bytes[0])),
                 low = high + (RowsQuery<Traits>::kBytes >> 4);
  const uint64_t values =
      Swizzle<128>::descriptor(shared_address(shared.values), Values::kHalfBytes);
  int stage = 0;
  uint32_t phase = 0;
#pragma unroll 1
  for (int token = begin; token < end; token += kRowsTile) {
    wait_barrier(shared_address(&shared.full[stage]), phase);
    __syncthreads();  // nobody reads the last tile's values any more
    const uint32_t lost = pipeline.lost_pieces();
    const bool is_clean = token >= clean_begin && token <= clean_end && !lost;
    const uint64_t codes =
        Swizzle<kDim>::descriptor(shared_address(shared.k[0])) + ((stage * kRowsTile * kDim) >> 4);
    const auto convert = [&](int half) {
      if (is_clean) {
        Values::template convert<false>(shared, stage, half, 0, 0, 0, 0);
      } else {
        Values::template convert<true>(shared, stage, half, token, first_stored, end, lost);
      }
    };
    int c[32];
    multiply_query<kDim, false>(c, high, codes);
    convert(0);
    float dot[2];
    means.of(p, rows, paging, shared.query, token, last_group, warp, dot);
    wait_products<0>();
    keep(c);
#pragma unroll
    for (int i = 0; i < 32; ++i) c[i] *= 256;
    multiply_query<kDim, true>(c, low, codes);
    convert(1);
    wait_products<0>();
    keep(c);
    RowScores y;  // over gain
#pragma unroll
    for (int i = 0; i < kRowsTile / 4; ++i) {
      const RowAffine key = Traits::Key::affine(shared.k_params[stage][i / 2 * 8 + 2 * t + i % 2]);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        y[r][i] = fmaf(key.scale, float(c[i / 2 * 4 + 2 * r + i % 2]),
                       fmaf(key.offset, scales[r].sum, dot[r]));
      }
    }
    float by[2] = {gain[0], gain[1]};
    if (!is_clean) {
      mask_rows(p, shared, token, stage, lost, row, t, gain, y);
      by[0] = by[1] = 1.f;
    }
    acc.weigh(y, by);
    publish_shared();
    __syncthreads();  // all values are there, and nobody needs the stage any more
    acc.add(values);
    pipeline.load(token + kStages * kRowsTile, stage);
    acc.wait();
    if (++stage == kStages) stage = 0, phase ^= 1;
  }
  __syncthreads();
  acc.leave(shared, row, t);
  __syncwarp();
  const int64_t unit = int64_t(sequence) * gridDim.x + head * p.row_tiles + row_tile;
  finish_rows(p, shared, unit, split, combines, warp);
}

}  // namespace kvquant::cuda
