// What becomes of a piece of work: the warps' results are merged, then the splits', in fixed order,
// and the rows are written.
#pragma once

#include <cstddef>

#include "kernels/append/rows.cuh"
#include "kernels/attention/means.cuh"
#include "kernels/attention/tile.cuh"

namespace kvquant::cuda {

template <class Traits>
struct AttentionShared {
  static constexpr int kMergeWidth = Traits::kDim < 128 ? Traits::kDim : 128;
  static constexpr int kStageBytes = Traits::kWarps * Pieces<Traits>::kSharedBytes;

  // Bytes of a launch whose warps' rings have as many stages.
  static constexpr size_t bytes(int stages) {
    const size_t besides = offsetof(AttentionShared, rings), rings = size_t(stages) * kStageBytes;
    return stages && besides + rings < sizeof(AttentionShared) ? sizeof(AttentionShared)
                                                               : besides + rings;
  }

  struct Walked {
    QueryShared<Traits> query;
    union {
      RawQuery<Traits> raw;  // until the query is prepared
      float dots[kGroups<Traits>][Traits::kRows];
    };
  };
  union {
    Walked walked;
    alignas(16) float result[Traits::kRows][Traits::kDim];
  };
  float4 row[Traits::kWarps][Traits::kRows];  // (base, sum, offsets) of a warp
  RowScale scale[Traits::kRows];
  float2 total[Traits::kRows];  // (base, sum) of the block
  RowTile rows;
  RowView views[Traits::kRows];
  bool last;
  union {
    alignas(16) unsigned char rings[16];  // and beyond
    alignas(16) float merge[Traits::kWarps][8][kMergeWidth + 4];
    float weights[kMaxSplits][8];
    struct {
      MeanScratch scratch;
      float mean[Traits::kDim];
    } append;
  };
};

// Sums the warps' accumulators into shared.result and shared.total, in the warps' order.
template <class Traits>
__device__ __forceinline__ void merge_warps(AttentionShared<Traits>& shared,
                                            const Accumulator<Traits>& acc, int g, int t) {
  constexpr int kMergeWidth = AttentionShared<Traits>::kMergeWidth;
  const int warp = threadIdx.x / 32;
#pragma unroll
  for (int r = 0; r < Traits::kRowSets; ++r) {
    float sum = acc.rows[r].sum, offsets = acc.rows[r].offsets;
#pragma unroll
    for (int step = 1; step < 4; step <<= 1) {
      sum += __shfl_xor_sync(kFullWarp, sum, step);
      offsets += __shfl_xor_sync(kFullWarp, offsets, step);
    }
    if (t == 0) {
      shared.row[warp][g + 8 * r] = make_float4(acc.rows[r].base, sum, offsets, 0.f);
    }
  }
#pragma unroll
  for (int r = 0; r < Traits::kRowSets; ++r) {
#pragma unroll
    for (int base = 0; base < Traits::kDim; base += kMergeWidth) {
      __syncthreads();  // the last round was read, or dots and query
#pragma unroll
      for (int w = 0; w < Traits::kDim / 32; ++w) {
        if (w / 4 != base / 128) continue;
        const int c = value_channel<Traits::kDim>(w, g) - base;
#pragma unroll
        for (int q = 0; q < 2; ++q) {
          float4 x = make_float4(acc.c[2 * w][r][q], acc.c[2 * w][r][q + 2], acc.c[2 * w + 1][r][q],
                                 acc.c[2 * w + 1][r][q + 2]);
          if constexpr (Traits::kSplit) {
            x.x += acc.c[2 * w][1][q], x.y += acc.c[2 * w][1][q + 2];
            x.z += acc.c[2 * w + 1][1][q], x.w += acc.c[2 * w + 1][1][q + 2];
          }
          *reinterpret_cast<float4*>(&shared.merge[warp][2 * t + q][c]) = x;
        }
      }
      __syncthreads();
      constexpr int kPieces = kMergeWidth / 4;
      for (int i = threadIdx.x; i < 8 * kPieces; i += Traits::kThreads) {
        const int place = i / kPieces, c = i % kPieces * 4, row = 8 * r + place;
        if (base + c >= Traits::kDim) continue;
        float max = kNoScore, sum = 0.f;
        float4 out = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
        for (int w = 0; w < Traits::kWarps; ++w) max = fmaxf(max, shared.row[w][row].x);
#pragma unroll
        for (int w = 0; w < Traits::kWarps; ++w) {
          const float4 state = shared.row[w][row];
          const float weight = exp2_approx(state.x - max);
          const float4 x = *reinterpret_cast<const float4*>(&shared.merge[w][place][c]);
          sum = fmaf(weight, state.y, sum);
          out.x = fmaf(weight, x.x + state.z, out.x), out.y = fmaf(weight, x.y + state.z, out.y);
          out.z = fmaf(weight, x.z + state.z, out.z), out.w = fmaf(weight, x.w + state.z, out.w);
        }
        *reinterpret_cast<float4*>(&shared.result[row][base + c]) = out;
        if (base + c == 0) shared.total[row] = make_float2(max, sum);
      }
    }
  }
  __syncthreads();
}

// Leaves this block's result for the last one of the sequence, KV head and row tile to merge.
// True in the last block, with the merged result in shared memory.
template <class Traits>
__device__ __forceinline__ bool merge_splits(const AttentionCall& p,
                                             AttentionShared<Traits>& shared, int64_t unit,
                                             int split, int splits) {
  constexpr int kFloats = Traits::kPartialFloats, kPieces = Traits::kRows * Traits::kDim / 4;
  constexpr int kInFlight = 16;  // splits whose results are on their way at once
  float* const all = p.partial + unit * p.splits * kFloats;
  float* const mine = all + int64_t(split) * kFloats;
  const float* const result = &shared.result[0][0];
  for (int i = threadIdx.x; i < kPieces; i += Traits::kThreads) {
    reinterpret_cast<float4*>(mine)[i] = reinterpret_cast<const float4*>(result)[i];
  }
  if (threadIdx.x < Traits::kRows) {
    reinterpret_cast<float2*>(mine + kPieces * 4)[threadIdx.x] = shared.total[threadIdx.x];
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    // Releases what the barrier has gathered, acquires what the others have left.
    shared.last = add_acquire_release(p.counters + unit, 1) == splits - 1;
    if (shared.last) p.counters[unit] = 0;
  }
  __syncthreads();
  if (!shared.last) return false;

  const int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
  const auto fetch = [&](int piece, int base, float4(&x)[kInFlight]) {
#pragma unroll
    for (int s = 0; s < kInFlight; ++s) {
      const float* from = all + int64_t(min(base + s, splits - 1)) * kFloats;
      x[s] = __ldcg(reinterpret_cast<const float4*>(from) + piece);
    }
  };
#pragma unroll 1
  for (int r = 0; r < Traits::kRowSets; ++r) {
    constexpr int kRowPieces = Traits::kDim / 4;
    float4 x[kInFlight];
    // On their way while splits are weighed.
    fetch(8 * r * kRowPieces + min(int(threadIdx.x), 8 * kRowPieces - 1), 0, x);
    for (int row = warp; row < 8; row += Traits::kWarps) {  // by a warp a row
      const auto part = [&](int s) {
        const float* from = all + int64_t(s) * kFloats + kPieces * 4;
        return s < splits ? __ldcg(reinterpret_cast<const float2*>(from) + 8 * r + row)
                          : make_float2(kNoScore, 0.f);
      };
      const float2 first = part(lane);
      float max = first.x, sum = 0.f;
      for (int s = lane + 32; s < splits; s += 32) max = fmaxf(max, part(s).x);
      max = warp_max(max);
      for (int s = lane; s < splits; s += 32) {
        const float2 mine = s == lane ? first : part(s);
        const float weight = exp2_approx(mine.x - max);
        shared.weights[s][row] = weight;
        sum = fmaf(weight, mine.y, sum);
      }
      sum = warp_sum(sum);
      if (lane == 0) shared.total[8 * r + row] = make_float2(max, sum);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < 8 * kRowPieces; i += Traits::kThreads) {
      const int row = i / kRowPieces, piece = 8 * r * kRowPieces + i;
      float4 out = make_float4(0.f, 0.f, 0.f, 0.f);
      for (int base = 0; base < splits; base += kInFlight) {
        if (base > 0 || i >= Traits::kThreads) fetch(piece, base, x);
#pragma unroll
        for (int s = 0; s < kInFlight; ++s) {
          const float weight = base + s < splits ? shared.weights[base + s][row] : 0.f;
          if (weight == 0.f) continue;  // its rows may see nothing
          out.x = fmaf(weight, x[s].x, out.x), out.y = fmaf(weight, x[s].y, out.y);
          out.z = fmaf(weight, x[s].z, out.z), out.w = fmaf(weight, x[s].w, out.w);
        }
      }
      reinterpret_cast<float4*>(&shared.result[0][0])[piece] = out;
    }
    __syncthreads();
  }
  return true;
}

// Sinks, division by the sum, the values' rotation; writes rows `first`, `first` + `step`, ... and
// their log-sum-exp. read(row, x) gives a lane's channels and (base, sum); rows up to kTogether
// steps beyond the last one are read too.
template <class Traits, int kTogether, class F>
__device__ __forceinline__ void finish_rows(const AttentionCall& p, const RowTile& rows, int first,
                                            int step, F&& read) {
  using Element = typename Traits::Element;
  using Row = WarpRow<Traits::kDim>;
  const int lane = threadIdx.x & 31;
  const CallRows call{rows.first_call_row, 0};
  for (; first < rows.count; first += step * kTogether) {
    float x[kTogether][Row::kCount];
#pragma unroll
    for (int r = 0; r < kTogether; ++r) {
      const int row = first + r * step;
      auto [max, sum] = read(row, x[r]);
      float weight = 1.f;
      if (sum == 0.f) max = -INFINITY, weight = 0.f;  // sees nothing
      if (p.sinks && row < rows.count) {
        const float sink = p.sinks[rows.head_of(row)] * kLog2e, most = fmaxf(max, sink);
        if (weight > 0.f) weight = exp2_approx(max - most);
        sum = fmaf(sum, weight, sink == most ? 1.f : exp2_approx(sink - most));
        max = most;
      }
      // A NaN may have no maximum to weigh it against a sink.
      const float factor = isnan(sum) ? sum : weight == 0.f ? 0.f : weight / sum;
#pragma unroll
      for (int i = 0; i < Row::kCount; ++i) x[r][i] = factor == 0.f ? 0.f : x[r][i] * factor;
      if (p.lse && lane == 0 && row < rows.count) {
        const float lse = sum == 0.f ? -INFINITY : (max + log2f(sum)) * kLn2;
        p.lse[(rows.first_call_row + rows.token_of(row)) * p.q_heads + rows.head_of(row)] = lse;
      }
    }
    if (p.cache.v_rotation > 1) rotate_warp<Traits::kDim>(x, p.cache.v_rotation);
#pragma unroll
    for (int r = 0; r < kTogether; ++r) {
      const int row = first + r * step;
      if (row >= rows.count) break;
      Element* out = static_cast<Element*>(p.out.data) +
                     row_offset(p.out, p.seqs, call, rows.sequence, rows.token_of(row)) +
                     rows.head_of(row) * p.out.head_stride;
      Row::pieces([&](auto width, int i, int c) {
        alignas(16) Element y[width()];
#pragma unroll
        for (int j = 0; j < width(); ++j) y[j] = from_float<Element>(x[r][i + j]);
        if constexpr (Traits::kUsual) {
          store_vector<width()>(out + c, y);
        } else {
#pragma unroll
          for (int j = 0; j < width(); ++j) {
            if (c + j < p.cache.v_dim) out[c + j] = y[j];
          }
        }
      });
    }
  }
}

// Writes the rows of a block that has all results.
template <class Traits>
__device__ __forceinline__ void finish_block(const AttentionCall& p,
                                             const AttentionShared<Traits>& shared) {
  constexpr int kTogether = Traits::kRowsPerWarp < 4 ? Traits::kRowsPerWarp : 4;
  using Row = WarpRow<Traits::kDim>;
  finish_rows<Traits, kTogether>(p, shared.rows, threadIdx.x / 32, Traits::kWarps,
                                 [&](int row, float (&x)[Row::kCount]) {
                                   Row::pieces([&](auto width, int i, int c) {
#pragma unroll
                                     for (int j = 0; j < width(); ++j) {
                                       x[i + j] = shared.result[row][c + j];
                                     }
                                   });
                                   return shared.total[row];
                                 });
}

// Merges the splits of blocks that are one cluster, through each other's shared memory, and writes
// the rows: each block those whose number is its own, counted around.
template <class Traits>
__device__ __forceinline__ void finish_cluster(const AttentionCall& p,
                                               AttentionShared<Traits>& shared, int split,
                                               int splits) {
  using Row = WarpRow<Traits::kDim>;
  constexpr int kInFlight = 8;  // splits whose results are on their way at once
  const int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
  cluster_barrier<true>();
  const auto read = [&](int row, float (&x)[Row::kCount]) {
    float y[kInFlight][Row::kCount];
    const auto fetch = [&](int base) {
#pragma unroll
      for (int s = 0; s < kInFlight; ++s) {
        Row::pieces([&](auto width, int i, int c) {
          load_peer<width()>(&shared.result[row][c], min(base + s, splits - 1), &y[s][i]);
        });
      }
    };
    fetch(0);
    float part[2] = {kNoScore, 0.f};
    if (lane < splits) load_peer<2>(&shared.total[row].x, lane, part);
    const float max = warp_max(part[0]), weights = exp2_approx(part[0] - max);
    const float sum = warp_sum(weights * part[1]);
#pragma unroll
    for (int i = 0; i < Row::kCount; ++i) x[i] = 0.f;
    for (int base = 0; base < splits; base += kInFlight) {
      if (base > 0) fetch(base);
#pragma unroll
      for (int s = 0; s < kInFlight; ++s) {
        const float weight = __shfl_sync(kFullWarp, weights, (base + s) & 31);
        if (base + s >= splits || weight == 0.f) continue;  // its rows may see nothing
#pragma unroll
        for (int i = 0; i < Row::kCount; ++i) x[i] = fmaf(weight, y[s][i], x[i]);
      }
    }
    return make_float2(max, sum);
  };
  finish_rows<Traits, 1>(p, shared.rows, split + warp * splits, splits * Traits::kWarps, read);
  cluster_barrier<false>();  // nobody's memory is read any more
}

}  // namespace kvquant::cuda
