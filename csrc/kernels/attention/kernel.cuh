// Attention on the 8-bit cache: a block's walk over its split of the tokens, and the merges.
//
// A block takes up to 32 query rows (query tokens x heads of one KV head) and one split of the
// tokens; its 8 warps take 16 tokens each in turn. Splits are merged by the last block to arrive,
// in their order, so that a call's result is the same bit for bit every time.
#pragma once

#include "kernels/attention/tile.cuh"

namespace kvquant::cuda {

template <class Traits>
struct AttentionShared {
  static constexpr int kMergeWidth = Traits::kDim < 128 ? Traits::kDim : 128;
  QueryShared<Traits> query;
  alignas(16) float result[Traits::kRows][Traits::kDim];
  float4 row[kAttentionWarps][Traits::kRows];  // (max, sum, offsets, 1 / value gain) of a warp
  RowScale scale[Traits::kRows];
  float2 total[Traits::kRows];  // (max, sum) of the block
  Item items[2];                // at hand and next
  bool last;
  union {
    alignas(16) float merge[kAttentionWarps][4][kMergeWidth + 4];
    float weights[kMaxSplits][8];
  };
  alignas(16) Stage<Traits::kDim> ring[kAttentionWarps];  // goes on behind the struct
};

// Softcap, ALiBi and the mask on a tile's scores, where there is any of them.
template <class Traits>
__device__ __forceinline__ void shape_scores(const AttentionParams& p, const RowTile& rows,
                                             int token, int g, int t, uint4& v_params,
                                             float (&score)[Traits::kRowSets][4]) {
  const bool masked = token < rows.all_begin || token + kTile > rows.all_end;
  if (!masked && p.softcap == 0.f && !p.alibi_slopes) return;
  const float cap = p.softcap * kLog2e;
#pragma unroll
  for (int r = 0; r < Traits::kRowSets; ++r) {
    const int row = g + 8 * r, at = rows.position_of(row);
    const int begin = rows.first_seen(p, at), end = row < rows.count ? rows.seen_end(p, at) : 0;
    const float slope =
        p.alibi_slopes && row < rows.count ? p.alibi_slopes[rows.head_of(row)] * kLog2e : 0.f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int j = token + 4 * t + i;
      float& s = score[r][i];
      if (p.softcap > 0.f) s = cap * tanhf(s / cap);
      s -= slope * fabsf(float(at - j));
      if (j < begin || j >= end) s = -INFINITY;
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {  // nobody's tokens may hold anything
    const int j = token + 4 * t + i;
    if (j < max(rows.begin, rows.start) || j >= rows.end) {
      (i == 0 ? v_params.x : i == 1 ? v_params.y : i == 2 ? v_params.z : v_params.w) = 0;
    }
  }
}

// A warp's way through its block's items: every eighth tile of 16 tokens. Up to `stages` tiles are
// on their way, of the next item too, so that memory is busy while results are merged.
template <class Traits>
struct Walk {
  const AttentionParams& p;
  const Paging& paging;
  Stage<Traits::kDim>* ring;  // this warp's first stage; the next is kAttentionWarps further
  int stages;
  const Item* asked;      // the item whose tiles are asked for
  const Item* next;       // to ask for after it; null: not known
  int coming = 0;         // token of the tile to ask for
  int coming_block = -1;  // its block, looked up one step ahead; -1: there is none
  int pending = 0;        // tiles asked for and not used
  int in = 0, out = 0;    // stages to fill and to use
  int live = 0;           // stages that hold a tile with a block, as bits

  __device__ __forceinline__ Walk(const AttentionParams& p, const Paging& paging,
                                  Stage<Traits::kDim>* rings, int stages, const Item* first)
      : p(p), paging(paging), ring(rings + threadIdx.x / 32), stages(stages), next(nullptr) {
    enter(first);
    fill();
  }

  __device__ __forceinline__ void enter(const Item* item) {
    asked = item;
    coming = item->begin + int(threadIdx.x / 32) * kTile;
    coming_block = find_block(coming);
  }
  __device__ __forceinline__ int find_block(int at) const {
    if (at >= asked->end) return -1;
    if (asked->whole >= 0) return asked->whole;
    return block_of(p.cache, p.seqs, asked->rows.sequence, at >> paging.shift);
  }
  // The mean of the group of the tile to ask for; null without means, or where its block is lost.
  __device__ __forceinline__ const __half* find_mean() const {
    if (!p.cache.group) return nullptr;
    const int start = coming & -p.cache.group;
    // A block at least as long as the group holds the mean of its own tokens.
    const int block = p.cache.block_size >= p.cache.group ? coming_block : find_block(start);
    if (block < 0) return nullptr;
    return rows_of<__half>(p.cache.k_mean, block, asked->rows.head) +
           int64_t((start & paging.mask) >> paging.group_shift) * p.cache.k_dim;
  }
  __device__ __forceinline__ int after(int stage) const {
    return stage + 1 < stages ? stage + 1 : 0;
  }

  // Asks for tiles while there are any and a stage is free.
  __device__ __forceinline__ void fill() {
    while (pending < stages) {
      if (coming >= asked->end) {
        if (!next) return;
        enter(next);
        next = nullptr;
        continue;
      }
      const __half* mean = coming_block < 0 ? nullptr : find_mean();
      const bool there = coming_block >= 0 && (mean || !p.cache.group);
      if (there) {
        fill_stage(ring[in * kAttentionWarps], p.cache, asked->rows.head, coming_block,
                   coming & paging.mask, mean);
      }
      commit_copies();
      live = (live & ~(1 << in)) | int(there) << in;
      in = after(in);
      ++pending;
      coming += kStep;
      coming_block = find_block(coming);
    }
  }

  // This warp's tiles of an item end up in acc.
  __device__ __forceinline__ void run(const Item& item, const Query<Traits>& query,
                                      Accumulator<Traits>& acc) {
    const int g = query.g, t = query.t;
    int group = -1;
    float dots[Traits::kRowSets] = {};
    for (int token = item.begin + int(threadIdx.x / 32) * kTile; token < item.end; token += kStep) {
      wait_copies(pending - 1);
      __syncwarp();
      if (live >> out & 1) {
        const Stage<Traits::kDim>& tile = ring[out * kAttentionWarps];
        if (p.cache.group && token >> paging.group_shift != group) {
          group = token >> paging.group_shift;
          dot_mean(tile, query, dots);
        }
        float score[Traits::kRowSets][4];
        score_tile(tile, query, dots, score);
        uint4 v_params = tile.v_params[t];
        shape_scores<Traits>(p, item.rows, token, g, t, v_params, score);
        float best[Traits::kRowSets], v_scale = 0.f;
#pragma unroll
        for (int r = 0; r < Traits::kRowSets; ++r) {
          best[r] = fmaxf(fmaxf(score[r][0], score[r][1]), fmaxf(score[r][2], score[r][3]));
          best[r] = fmaxf(best[r], __shfl_xor_sync(kFullWarp, best[r], 1));
          best[r] = fmaxf(best[r], __shfl_xor_sync(kFullWarp, best[r], 2));
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) v_scale = fmaxf(v_scale, half2_floats(word_of(v_params, i)).x);
        follow(acc, best, v_scale, t);
        add_values(acc, tile, v_params, g, t, score);
      }
      __syncwarp();  // all lanes have read the stage
      out = after(out);
      --pending;
      fill();
    }
  }
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
      shared.row[warp][g + 8 * r] =
          make_float4(acc.rows[r].max, sum, offsets, 1.f / acc.value_gain);
    }
  }
#pragma unroll
  for (int r = 0; r < Traits::kRowSets; ++r) {
#pragma unroll
    for (int q = 0; q < 2; ++q) {  // even and odd rows: half the room
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
          *reinterpret_cast<float4*>(&shared.merge[warp][t][c]) = x;
        }
        __syncthreads();
        constexpr int kPieces = kMergeWidth / 4;
        const int quarter = threadIdx.x / kPieces, c = int(threadIdx.x % kPieces) * 4;
        const int row = 8 * r + 2 * quarter + q;
        if (quarter >= 4 || base + c >= Traits::kDim) continue;
        float max = kNoScore, sum = 0.f;
        float4 out = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
        for (int w = 0; w < kAttentionWarps; ++w) max = fmaxf(max, shared.row[w][row].x);
#pragma unroll
        for (int w = 0; w < kAttentionWarps; ++w) {
          const float4 state = shared.row[w][row];
          const float weight = exp2_approx(state.x - max);
          const float4 x = *reinterpret_cast<const float4*>(&shared.merge[w][quarter][c]);
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
      sum = fmaf(sum, weight, exp2_approx(sink - most));
      max = most;
    }
    const float factor = weight == 0.f ? 0.f : weight / sum;
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

// Persistent blocks: each starts with the item of its own index and draws the next ones from a
// counter, one ahead. The last draw of all leaves the counter zero.
template <class Traits>
__global__ void __launch_bounds__(kAttentionThreads, Traits::kMinBlocks)
    attention_kernel(const __grid_constant__ AttentionParams p, int stages, int row_tiles,
                     int total) {
  extern __shared__ __align__(16) unsigned char memory[];
  auto& shared = *reinterpret_cast<AttentionShared<Traits>*>(memory);
  const bool leads = threadIdx.x == 0, drawing = gridDim.x < total;
  int* const counter = p.counters + total / p.splits;
  int drawn = leads && drawing ? atomicAdd(counter, 1) : 0;  // on its way until the next draw
  const auto draw = [&](Item& item) {
    item.there = false;
    while (drawing && !item.there) {
      const int index = drawn + int(gridDim.x);
      if (drawn == total - 1) *counter = 0;
      if (index >= total) return;
      drawn = atomicAdd(counter, 1);
      item.there = make_item(p, index, row_tiles, Traits::kRows, item);
    }
  };
  if (leads) {
    Item& first = shared.items[0];
    first.there = make_item(p, blockIdx.x, row_tiles, Traits::kRows, first);
    if (!first.there) draw(first);
  }
  __syncthreads();
  if (!shared.items[0].there) return;

  const Paging paging(p.cache, p.seqs.max_blocks);
  const int g = (threadIdx.x & 31) >> 2, t = threadIdx.x & 3;
  RawQuery<Traits> raw(p, shared.items[0].rows);
  Walk<Traits> walk(p, paging, shared.ring, stages, &shared.items[0]);
  for (int at = 0;; at ^= 1) {
    const Item& item = shared.items[at];
    Item& next = shared.items[at ^ 1];
    if (leads) draw(next);
    prepare_query(p, raw, shared.query, shared.scale);
    __syncthreads();
    const bool more = next.there;
    if (more) walk.next = &next;
    walk.fill();
    const Query<Traits> query(shared.query, shared.scale, g, t);
    Accumulator<Traits> acc;
    walk.run(item, query, acc);
    if (more) raw = RawQuery<Traits>(p, next.rows);
    merge_warps(shared, acc, g, t);
    if (item.splits == 1 || merge_splits(p, shared, item)) finish_rows(p, item.rows, shared);
    if (!more) return;
    __syncthreads();
  }
}

}  // namespace kvquant::cuda
