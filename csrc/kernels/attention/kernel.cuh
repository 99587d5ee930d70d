// Attention on the 8-bit cache: a block's walk over its pieces of work.
//
// A block takes up to 32 query rows (query tokens x heads of one KV head) and one split of the
// tokens; its 8 warps take 16 tokens each in turn. Splits are merged by the last block to arrive,
// in their order, so that a call's result is the same bit for bit every time.
#pragma once

#include "kernels/attention/merge.cuh"

namespace kvquant::cuda {

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
  // The mean of the group of the tile to ask for; null, which counts as zero, without means or
  // where its block is lost.
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
      const bool there = coming_block >= 0;
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
