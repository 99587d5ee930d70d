// What becomes of a piece of work: the warps' results are merged, then the splits', in fixed order,
// and the rows are written.
#pragma once

#include "kernels/attention/tile.cuh"

namespace kvquant::cuda {

template <class Traits>
struct AttentionShared {
  static constexpr int kMergeWidth = Traits::kDim < 128 ? Traits::kDim : 128;
  static constexpr int kMergeRows = merge_rows(Traits::kDim);
  QueryShared<Traits> query;
  alignas(16) float result[Traits::kRows][Traits::kDim];
  float4 row[kAttentionWarps][Traits::kRows];  // (max, sum, offsets, 1 / value gain) of a warp
  RowScale scale[Traits::kRows];
  float2 total[Traits::kRows];  // (max, sum) of the block
  Item items[2];                // at hand and next
  bool last;
  union {
    alignas(16) float merge[kAttentionWarps][kMergeRows][kMergeWidth + 4];
    float weights[kMaxSplits][8];
  };
  alignas(16) Stage<Traits::kDim> ring[kAttentionWarps];  // goes on behind the struct
};

// Sums the warps' accumulators into shared.result and shared.total, in the warps' order.
template <class Traits>
__device__ __forceinline__ void merge_warps(AttentionShared<Traits>& shared,
                                            const Accumulator<Traits>& acc, int g, int t) {
  constexpr int kMergeWidth = AttentionShared<Traits>::kMergeWidth;
  constexpr int kMergeRows = AttentionShared<Traits>::kMergeRows;
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
      shared.row[warp][g + 8 * r] =
          make_float4(acc.rows[r].max, sum, offsets, 1.f / acc.value_gain);
    }
  }
#pragma unroll
  for (int r = 0; r < Traits::kRowSets; ++r) {
#pragma unroll
    for (int round = 0; round < 8 / kMergeRows; ++round) {
      const int q = round % 2, first = round / 2 * kMergeRows;  // rows 2 t + q, t from first on
#pragma unroll
      for (int base = 0; base < Traits::kDim; base += kMergeWidth) {
        __syncthreads();  // the last round was read
#pragma unroll
        for (int w = 0; w < Traits::kDim / 32; ++w) {
          if (w / 4 != base / 128) continue;
          const int c = value_channel<Traits::kDim>(w, g) - base;
          float4 x = make_float4(acc.c[2 * w][r][q], acc.c[2 * w][r][q + 2], acc.c[2 * w + 1][r][q],
                                 acc.c[2 * w + 1][r][q + 2]);
          if constexpr (Traits::kSplit) {
            x.x += acc.c[2 * w][1][q], x.y += acc.c[2 * w][1][q + 2];
            x.z += acc.c[2 * w + 1][1][q], x.w += acc.c[2 * w + 1][1][q + 2];
          }
          if (kMergeRows == 4 || t / kMergeRows == first / kMergeRows) {
            *reinterpret_cast<float4*>(&shared.merge[warp][t % kMergeRows][c]) = x;
          }
        }
        __syncthreads();
        constexpr int kPieces = kMergeWidth / 4;
        const int place = threadIdx.x / kPieces, c = int(threadIdx.x % kPieces) * 4;
        const int row = 8 * r + 2 * (first + place) + q;
        if (place >= kMergeRows || base + c >= Traits::kDim) continue;
        float max = kNoScore, sum = 0.f;
        float4 out = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
        for (int w = 0; w < kAttentionWarps; ++w) max = fmaxf(max, shared.row[w][row].x);
#pragma unroll
        for (int w = 0; w < kAttentionWarps; ++w) {
          const float4 state = shared.row[w][row];
          const float weight = exp2_approx(state.x - max);
          const float4 x = *reinterpret_cast<const float4*>(&shared.merge[w][place][c]);
          sum = fmaf(weight, state.y, sum);
          out.x = fmaf(weight, fmaf(x.x, state.w, state.z), out.x);
          out.y = fmaf(weight, fmaf(x.y, state.w, state.z), out.y);
          out.z = fmaf(weight, fmaf(x.z, state.w, state.z), out.z);
          out.w = fmaf(weight, fmaf(x.w, state.w, state.z), out.w);
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
__device__ __forceinline__ bool merge_splits(const AttentionParams& p,
                                             AttentionShared<Traits>& shared, const Item& item) {
  const int splits = item.splits;
  constexpr int kFloats = Traits::kPartialFloats, kPieces = Traits::kRows * Traits::kDim / 4;
  constexpr int kInFlight = 8;  // splits whose results are on their way at once
  float* const all = p.partial + item.unit * p.splits * kFloats;
  float* const mine = all + int64_t(item.split) * kFloats;
  const float* const result = &shared.result[0][0];
  for (int i = threadIdx.x; i < kPieces; i += kAttentionThreads) {
    reinterpret_cast<float4*>(mine)[i] = reinterpret_cast<const float4*>(result)[i];
  }
  if (threadIdx.x < Traits::kRows) {
    reinterpret_cast<float2*>(mine + kPieces * 4)[threadIdx.x] = shared.total[threadIdx.x];
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    // Releases what the barrier has gathered, acquires what the others have left.
    shared.last = add_acquire_release(p.counters + item.unit, 1) == splits - 1;
    if (shared.last) p.counters[item.unit] = 0;
  }
  __syncthreads();
  if (!shared.last) return false;

  const int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
#pragma unroll
  for (int r = 0; r < Traits::kRowSets; ++r) {
    {  // a warp weighs one row's splits
      const int row = warp + 8 * r;
      float2 part[kMaxSplits / 32];
      float max = kNoScore, sum = 0.f;
#pragma unroll
      for (int i = 0; i < kMaxSplits / 32; ++i) {
        const int s = i * 32 + lane;
        part[i] = make_float2(kNoScore, 0.f);
        if (s < splits) {
          const float* from = all + int64_t(s) * kFloats + kPieces * 4;
          part[i] = __ldcg(reinterpret_cast<const float2*>(from) + row);
        }
      }
#pragma unroll
      for (int i = 0; i < kMaxSplits / 32; ++i) max = fmaxf(max, part[i].x);
      max = warp_max(max);
#pragma unroll
      for (int i = 0; i < kMaxSplits / 32; ++i) {
        const int s = i * 32 + lane;
        const float weight = exp2_approx(part[i].x - max);
        if (s < splits) shared.weights[s][warp] = weight;
        sum = fmaf(weight, part[i].y, sum);
      }
      sum = warp_sum(sum);
      if (lane == 0) shared.total[row] = make_float2(max, sum);
    }
    __syncthreads();
    constexpr int kRowPieces = Traits::kDim / 4;
    for (int i = threadIdx.x; i < 8 * kRowPieces; i += kAttentionThreads) {
      const int row = i / kRowPieces, piece = 8 * r * kRowPieces + i;
      float4 out = make_float4(0.f, 0.f, 0.f, 0.f);
      for (int base = 0; base < splits; base += kInFlight) {
        float4 x[kInFlight];
#pragma unroll
        for (int s = 0; s < kInFlight; ++s) {
          const float* from = all + int64_t(min(base + s, splits - 1)) * kFloats;
          x[s] = __ldcg(reinterpret_cast<const float4*>(from) + piece);
        }
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

// Sinks, division by the sum, the values' rotation; writes the rows and their log-sum-exp.
template <class Traits>
__device__ __forceinline__ void finish_rows(const AttentionParams& p, const RowTile& rows,
                                            const AttentionShared<Traits>& shared) {
  using Element = typename Traits::Element;
  constexpr int kCount = Traits::kDim / 32;
  const int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
  const CallRows call{rows.first_call_row, 0};
  for (int row = warp; row < rows.count; row += kAttentionWarps) {
    float max = shared.total[row].x, sum = shared.total[row].y, weight = 1.f;
    if (sum == 0.f) max = -INFINITY, weight = 0.f;  // sees nothing
    if (p.sinks) {
      const float sink = p.sinks[rows.head_of(row)] * kLog2e, most = fmaxf(max, sink);
      if (weight > 0.f) weight = exp2_approx(max - most);
      sum = fmaf(sum, weight, sink == most ? 1.f : exp2_approx(sink - most));
      max = most;
    }
    // A NaN may have no maximum to weigh it against a sink.
    const float factor = isnan(sum) ? sum : weight == 0.f ? 0.f : weight / sum;
    float x[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float y = shared.result[row][32 * i + lane];
      x[i] = factor == 0.f ? 0.f : y * factor;
    }
    if (p.cache.v_rotation > 1) rotate_warp(x, p.cache.v_rotation);
    const int token = rows.token_of(row), head = rows.head_of(row);
    Element* out = static_cast<Element*>(p.out.data) +
                   row_offset(p.out, p.seqs, call, rows.sequence, token) + head * p.out.head_stride;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int c = 32 * i + lane;
      if (c < p.cache.v_dim) out[c] = from_float<Element>(x[i]);
    }
    if (p.lse && lane == 0) {
      const float lse = sum == 0.f ? -INFINITY : (max + log2f(sum)) * kLn2;
      p.lse[(rows.first_call_row + token) * p.q_heads + head] = lse;
    }
  }
}

}  // namespace kvquant::cuda
