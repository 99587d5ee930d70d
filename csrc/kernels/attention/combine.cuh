// What becomes of a piece of work: the warps' results are combined, then the splits', in fixed
// order, and the rows are written. A warp has a row, a lane the channels that WarpRow says.
#pragma once

#include <cstddef>

#include "kernels/attention/accumulate.cuh"
#include "kernels/attention/means.cuh"
#include "kernels/attention/places.cuh"

namespace kvquant::cuda {

template <class Traits>
struct AttentionShared {
  static constexpr int kStageBytes =
      Traits::kWarps * std::max(LoadPipeline<Traits>::kSharedBytes,
                                LoadPipeline<typename Traits::Appended>::kSharedBytes);

  // Bytes of a launch whose warps' rings have as many stages.
  static constexpr size_t bytes(int stages) {
    const size_t besides = offsetof(AttentionShared, rings), rings = size_t(stages) * kStageBytes;
    return stages && besides + rings < sizeof(AttentionShared) ? sizeof(AttentionShared)
                                                               : besides + rings;
  }

  QueryShared<Traits> query;
  union {
    RawQuery<Traits> raw;  // until the query is prepared
    float mean_scores[kGroups<Traits>][Traits::kRows];
  };
  float4 row[Traits::kWarps][8];  // (base, sum of p, of p times middles) of a warp's eight rows
  RowScale scale[Traits::kRows];
  RowTile rows;
  RowView views[Traits::kRows];
  NewTokens<typename Traits::Appended> new_tokens;
  InSlab young;                         // by age: the young tokens of the block
  uint32_t parameters[Traits::kWarps];  // for their coming
  union {
    alignas(128) unsigned char rings[128];  // and beyond
    alignas(16) float merge[Traits::kWarps][8][Traits::kDim + 4];
    alignas(16) typename GroupMeans<Traits>::Stage means;
    GroupScratch groups;
  };
};

// The result for one query row of some of its tokens: the sum of weight times value, where weights
// are exp2(score - max), and the sum of weights.
template <class Traits>
struct RowResult {
  float x[WarpRow<Traits::kDim>::kCount];
  float max, sum;
};

// Where channel c of a warp's row is: its warps' lanes meet different banks as they leave rows.
template <int kDim>
__device__ __forceinline__ int combine_place(int c) {
  return c ^ (c >> (c < kDim / 128 * 128 ? 4 : 3) & 1) << 2;
}

// Leaves a warp's accumulators of rows 8 r and following, of which `count` are some, in shared
// memory.
template <int r, class Traits>
__device__ __forceinline__ void store_warp(AttentionShared<Traits>& shared,
                                           const Accumulator<Traits>& acc, int count, int g,
                                           int t) {
  using Values = ValueTile<typename Traits::Value, Traits::kDim>;
  const int warp = threadIdx.x / 32;
#pragma unroll
  for (int w = 0; w < Traits::kDim / 32; ++w) {
    const int c = combine_place<Traits::kDim>(Values::channel(w, g));
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      if (2 * t + q >= count) continue;
      *reinterpret_cast<float4*>(&shared.merge[warp][2 * t + q][c]) =
          acc.template channels<r>(w, q);
    }
  }
  acc.template store_rows<r>(shared.row[warp], g, t);
}

// The sum of the warps' results, in their order. row: of the eight that they left.
template <class Traits>
__device__ __forceinline__ RowResult<Traits> combine_warps(const AttentionShared<Traits>& shared,
                                                           int row) {
  RowResult<Traits> all{};
  float4 state[Traits::kWarps];
  all.max = kNoScore;
#pragma unroll
  for (int w = 0; w < Traits::kWarps; ++w) {
    state[w] = shared.row[w][row];
    all.max = fmaxf(all.max, state[w].x);
  }
#pragma unroll
  for (int w = 0; w < Traits::kWarps; ++w) {
    const float weight = exp2_approx(state[w].x - all.max);
    all.sum = fmaf(weight, state[w].y, all.sum);
    WarpRow<Traits::kDim>::pieces([&](auto width, int i, int c) {
#pragma unroll
      for (int j = 0; j < width(); ++j) {
        const float x = shared.merge[w][row][combine_place<Traits::kDim>(c) + j];
        all.x[i + j] = fmaf(weight, x + state[w].z, all.x[i + j]);
      }
    });
  }
  return all;
}

// Where a block leaves its results for the last split of the unit.
template <class Traits>
struct Partial {
  float* unit;  // splits one after the other: rows of channels, then (max, sum) of each

  __device__ __forceinline__ float* channels(int split, int row) const {
    return unit + int64_t(split) * Traits::kPartialFloats + row * Traits::kDim;
  }
  __device__ __forceinline__ float* total(int split, int row) const {
    return unit + int64_t(split) * Traits::kPartialFloats + Traits::kRows * Traits::kDim + row * 2;
  }
};

template <class Traits>
__device__ __forceinline__ void store_partial(const Partial<Traits>& partial, int split, int row,
                                              const RowResult<Traits>& result) {
  WarpRow<Traits::kDim>::pieces([&](auto width, int i, int c) {
    leave_floats<width()>(partial.channels(split, row) + c, result.x + i);
  });
  const float total[2] = {result.max, result.sum};
  if (threadIdx.x % 32 == 0) leave_floats<2>(partial.total(split, row), total);
}

// The largest one that is at most x.
constexpr int power_of_two(int x) { return x < 2 ? 1 : 2 * power_of_two(x / 2); }
// Splits that are summed by one maximum: as many as have room in the registers of every instance
// for such rows, so that their bits are the same.
template <class Traits>
constexpr int kSummed = power_of_two((Traits::kRowSets > 2 ? 16 : 32) * 32 / Traits::kDim);
// Splits that a warp looks at at once.
template <class Traits>
constexpr int kLookedAt = kSummed<Traits> * (Traits::kShape.blocks == 1 ? 2 : 1);
// How often a warp looks for what has not arrived, some seconds: what never comes, since a program
// changes lengths while they are read, is left as the NaN that is there.
constexpr int kMostLooks = 1 << 23;

// Adds the results of the splits before the last one to the last one's, in their order, as they
// arrive, and leaves their places as they were. Blocks start in their order: those that are waited
// for run, or have run.
template <class Traits>
__device__ __forceinline__ void combine_splits(const Partial<Traits>& partial, int others, int row,
                                               RowResult<Traits>& all) {
  using Row = WarpRow<Traits::kDim>;
  constexpr int kChunk = kLookedAt<Traits>, kPart = kSummed<Traits>, kParts = kChunk / kPart;
  static_assert(32 % kChunk == 0);
  const int lane = threadIdx.x & 31;
#pragma unroll 1
  for (int base = 0; base < others; base += kChunk) {
    const int count = min(kChunk, others - base);
    // Calls f(s) for those of the chunk, four without a branch between them: some may be none.
    const auto each = [&](auto&& f) {
#pragma unroll
      for (int s = 0; s < kChunk; ++s) {
        if (s % 4 == 0 && s >= count) break;
        f(s);
      }
    };
    const int mine = lane % kChunk;  // a lane has the (max, sum) of one
    float y[kChunk][Row::kCount] = {}, total[2] = {kNoScore, 0.f};
    for (int looks = kMostLooks; looks; --looks) {
      each([&](int s) {
        Row::pieces([&](auto width, int i, int c) {
          if (s < count) look_at_floats<width()>(partial.channels(base + s, row) + c, &y[s][i]);
        });
      });
      if (mine < count) look_at_floats<2>(partial.total(base + mine, row), total);
      uint32_t most = max(__float_as_uint(total[0]), __float_as_uint(total[1]));
      each([&](int s) {
#pragma unroll
        for (int i = 0; i < Row::kCount; ++i) most = max(most, __float_as_uint(y[s][i]));
      });
      if (__all_sync(kFullWarp, most != kNothing)) break;
    }
    float shrink[kParts], weighs = 0.f, weight[kChunk];
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const bool of_part = mine / kPart == part;
      const float max = fmaxf(all.max, warp_max(of_part ? total[0] : kNoScore));
      shrink[part] = exp2_approx(all.max - max);
      if (of_part) weighs = exp2_approx(total[0] - max);
      all.max = max;
    }
#pragma unroll
    for (int s = 0; s < kChunk; ++s) weight[s] = __shfl_sync(kFullWarp, weighs, s);
    float sum = __fmul_rn(weighs, total[1]);  // whether or not it could be fused
#pragma unroll
    for (int step = 1; step < kPart; step <<= 1) sum += __shfl_xor_sync(kFullWarp, sum, step);
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      all.sum = fmaf(all.sum, shrink[part], __shfl_sync(kFullWarp, sum, part * kPart));
    }
    const float nothing[4] = {__uint_as_float(kNothing), __uint_as_float(kNothing),
                              __uint_as_float(kNothing), __uint_as_float(kNothing)};
    each([&](int s) {
      if (s % kPart == 0) {
        const float by = shrink[s / kPart];
#pragma unroll
        for (int i = 0; i < Row::kCount; ++i) all.x[i] *= by;
      }
      Row::pieces([&](auto width, int i, int c) {
#pragma unroll
        for (int j = i; j < i + width(); ++j) all.x[j] = fmaf(weight[s], y[s][j], all.x[j]);
        if (s < count) leave_floats<width()>(partial.channels(base + s, row) + c, nothing);
      });
    });
    if (lane < count) leave_floats<2>(partial.total(base + lane, row), nothing);
  }
}

// What a row's sums are to be multiplied by: sinks are counted, and it is divided by the sum of
// weights. writes: its log-sum-exp, where it is wanted.
__device__ __forceinline__ float normalize(const AttentionCall& p, const RowTile& rows, int row,
                                           float max, float sum, bool writes) {
  float weight = 1.f;
  if (sum == 0.f) max = -INFINITY, weight = 0.f;  // sees nothing
  if (p.sinks) {
    const float sink = p.sinks[rows.head_of(row)] * kLog2e, most = fmaxf(max, sink);
    if (weight > 0.f) weight = exp2_approx(max - most);
    sum = fmaf(sum, weight, sink == most ? 1.f : exp2_approx(sink - most));
    max = most;
  }
  // A NaN may have no maximum to weigh it against a sink.
  const float factor = isnan(sum) ? sum : weight == 0.f ? 0.f : __fdividef(weight, sum);
  if (p.lse && writes) {
    p.lse[(rows.first_call_row + rows.token_of(row)) * p.num_q_heads + rows.head_of(row)] =
        sum == 0.f ? -INFINITY : (max + log2f(sum)) * kLn2;
  }
  return factor;
}
// Where a row's output goes.
template <class Element>
__device__ __forceinline__ Element* output_of(const AttentionCall& p, const RowTile& rows,
                                              int row) {
  return static_cast<Element*>(p.out.data) +
         row_offset(p.out, p.seqs, {rows.first_call_row, 0}, rows.sequence, rows.token_of(row)) +
         rows.head_of(row) * p.out.head_stride;
}

// Normalizes, rotates the values back; writes the row and its log-sum-exp.
template <class Traits>
__device__ __forceinline__ void write_result(const AttentionCall& p, const RowTile& rows, int row,
                                             RowResult<Traits>& result) {
  using Element = typename Traits::Element;
  using Row = WarpRow<Traits::kDim>;
  const float factor = normalize(p, rows, row, result.max, result.sum, threadIdx.x % 32 == 0);
  float x[1][Row::kCount];
#pragma unroll
  for (int i = 0; i < Row::kCount; ++i) x[0][i] = result.x[i] * factor;
  if (p.cache.v.rotation > 1) rotate_warp<Traits::kDim>(x, p.cache.v.rotation);
  Element* const out = output_of<Element>(p, rows, row);
  Row::pieces([&](auto width, int i, int c) {
    alignas(16) Element y[width()];
#pragma unroll
    for (int j = 0; j < width(); ++j) y[j] = from_float<Element>(x[0][i + j], p.dtype);
    if constexpr (Traits::kPlainCall) {
      store_vector<width()>(out + c, y);
    } else {
#pragma unroll
      for (int j = 0; j < width(); ++j) {
        if (c + j < p.cache.v.head_dim) out[c + j] = y[j];
      }
    }
  });
}

// Merges what the warps have and, in the last split of the unit, what the others have left; writes
// the rows.
template <class Traits>
__device__ __forceinline__ void finish(const AttentionCall& p, AttentionShared<Traits>& shared,
                                       Accumulator<Traits>& acc, int64_t unit, int split,
                                       bool combines, int warp, int g, int t) {
  if constexpr (!Traits::kByAge) acc.template settle<typename Traits::Value>();
  const Partial<Traits> partial{p.partial + unit * p.splits * Traits::kPartialFloats};
#pragma unroll 1
  for (int r = 0; r < Traits::kRowSets; ++r) {
    if (r > 0 || Traits::kShape.stages > 0) __syncthreads();  // the place is read no more
    const int count = min(8, shared.rows.count - 8 * r);
    if (r == 0) store_warp<0>(shared, acc, count, g, t);
    if constexpr (Traits::kRowSets > 1) {
      if (r == 1) store_warp<1>(shared, acc, count, g, t);
    }
    if constexpr (Traits::kRowSets > 2) {
      if (r == 2) store_warp<2>(shared, acc, count, g, t);
      if (r == 3) store_warp<3>(shared, acc, count, g, t);
    }
    __syncthreads();
#pragma unroll 1
    for (int i = warp; i < count; i += Traits::kWarps) {
      const int row = 8 * r + i;
      RowResult<Traits> result = combine_warps(shared, i);
      if (!combines) {
        store_partial(partial, split, row, result);
      } else {
        combine_splits(partial, split, row, result);
        write_result(p, shared.rows, row, result);
      }
    }
  }
}

}  // namespace kvquant::cuda
