// Attention on the 8-bit cache: a block's walk over one split of the tokens.
//
// A block takes up to 32 query rows (query tokens x heads of one KV head) and one split of the
// tokens; its warps take 16 tokens each in turn. Splits are merged by the last block to arrive, in
// their order, so that a call's result is the same bit for bit every time. A decode step's own keys
// and values are appended by the blocks that attend to them.
#pragma once

#include "kernels/attention/merge.cuh"

namespace kvquant::cuda {

// Softcap, ALiBi and the mask on a tile's scores. Returns the largest scale of this lane's values:
// nobody's tokens may hold anything and do not count.
template <class Traits>
__device__ __forceinline__ float shape_scores(const AttentionCall& p,
                                              const AttentionShared<Traits>& shared, int token,
                                              int g, int t, const uint4& v_params,
                                              float (&score)[Traits::kRowSets][4]) {
  const float cap = p.softcap * kLog2e;
#pragma unroll
  for (int r = 0; r < Traits::kRowSets; ++r) {
    const RowView view = shared.views[g + 8 * r];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int j = token + 4 * t + i;
      float& s = score[r][i];
      if (p.softcap > 0.f) s = cap * tanh_approx(s * __frcp_rn(cap));
      s -= view.slope * fabsf(float(view.position - j));
      if (j < view.begin || j >= view.end) s = -INFINITY;
    }
  }
  float most = 0.f;
  const int begin = max(shared.rows.begin, shared.rows.start), end = shared.rows.end;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int j = token + 4 * t + i;
    const bool seen = j >= begin && j < end;
    most = fmaxf(most, seen ? half2_floats(word_of(v_params, i)).x : 0.f);
  }
  return most;
}

// A warp's way through tokens up to `end`: every kWarps-th piece of one or two tiles, the next ones
// on their way while one is worked on.
template <class Traits>
struct Walk {
  const AttentionCall& p;
  const Paging& paging;
  const int32_t* const table;  // of the sequence
  // Tiles from clean_begin on and up to clean_end need no look at single scores.
  int clean_begin, clean_end;
  const int end;
  int token;
  int block[Traits::kTiles];  // of the piece that was asked for last, -1: none
  int asked = 0;              // pieces, before the first one is taken
  Pieces<Traits> pieces;

  __device__ __forceinline__ Walk(const AttentionCall& p, unsigned char* rings, const RowTile& rows,
                                  const Paging& paging, int first_block, int begin, int end)
      : p(p),
        paging(paging),
        table(p.seqs.block_table + rows.sequence * p.seqs.block_table_stride),
        clean_begin(p.softcap == 0.f && !p.alibi_slopes ? rows.all_begin : 1 << 30),
        clean_end(rows.all_end - kTile),
        end(end),
        token(begin + int(threadIdx.x / 32) * kTile * Traits::kTiles),
        pieces(p.cache, rows.head, rings, p.stages) {
#pragma unroll
    for (int u = 0; u < Traits::kTiles; ++u) block[u] = first_block;
  }

  // Blocks of the piece at `at`. Nothing to look up where a sequence has one.
  __device__ __forceinline__ void find_blocks(int at, int (&found)[Traits::kTiles]) const {
    if (p.seqs.max_blocks == 1) return;
#pragma unroll
    for (int u = 0; u < Traits::kTiles; ++u) {
      found[u] = checked_block(p.cache,
                               table[min((at + u * kTile) >> paging.shift, p.seqs.max_blocks - 1)]);
    }
  }
  __device__ __forceinline__ void ask_keys(int at, const int (&blocks)[Traits::kTiles]) {
#pragma unroll
    for (int u = 0; u < Traits::kTiles; ++u) {
      if (at + u * kTile >= end) break;
      pieces.ask_keys(u, blocks[u], (at + u * kTile) & paging.mask);
    }
  }
  __device__ __forceinline__ void ask_values(int at, const int (&blocks)[Traits::kTiles]) {
#pragma unroll
    for (int u = 0; u < Traits::kTiles; ++u) {
      if (at + u * kTile >= end) {
        pieces.ask_nothing();
        break;
      }
      pieces.ask_values(u, blocks[u], (at + u * kTile) & paging.mask);
    }
    pieces.close();
  }
  // Asks for the first pieces, as many as have room, if they end before `until`.
  __device__ __forceinline__ void fill(int until) {
    for (; asked < pieces.stages(); ++asked) {
      const int at = token + asked * Traits::kStep;
      if (at < end && at + kTile * Traits::kTiles > until) return;
      find_blocks(at, block);
      ask_keys(at, block);
      ask_values(at, block);
    }
  }
  // Takes the pieces before `until`. shared.dots are of groups from first_group on.
  __device__ __forceinline__ void run(const AttentionShared<Traits>& shared,
                                      const Query<Traits>& query, int first_group, int until,
                                      Accumulator<Traits>& acc) {
    const int g = query.g, t = query.t;
    const float* const dots = &shared.walked.dots[0][g] - first_group * Traits::kRows;
    while (token < until) {
      const int next = token + pieces.stages() * Traits::kStep;
      int next_block[Traits::kTiles];
#pragma unroll
      for (int u = 0; u < Traits::kTiles; ++u) next_block[u] = block[u];
      find_blocks(next, next_block);
      pieces.wait_keys();
      float score[Traits::kTiles][Traits::kRowSets][4], v_scale = 0.f;
      uint4 v_params[Traits::kTiles];
      bool clean[Traits::kTiles];
#pragma unroll
      for (int u = 0; u < Traits::kTiles; ++u) {
        const int at = token + u * kTile;
        float dot[Traits::kRowSets];
#pragma unroll
        for (int r = 0; r < Traits::kRowSets; ++r) {
          dot[r] = dots[(at >> paging.group_shift) * Traits::kRows + 8 * r];
        }
        const auto& tile = pieces.keys(u);
        score_tile(tile, query, dot, score[u]);
        v_params[u] = tile.v_params;
        const bool usable = pieces.usable(u, block[u]);
        clean[u] = at >= clean_begin && at <= clean_end && usable;
        if (clean[u]) {
          const uint4& v = v_params[u];
          const uint32_t most = max_halves(max_halves(v.x, v.y), max_halves(v.z, v.w));
          v_scale = fmaxf(v_scale, half2_floats(most).x);
        } else if (at < end && usable) {
          v_scale = fmaxf(v_scale, shape_scores(p, shared, at, g, t, v_params[u], score[u]));
        } else {
#pragma unroll
          for (int r = 0; r < Traits::kRowSets; ++r) {
#pragma unroll
            for (int i = 0; i < 4; ++i) score[u][r][i] = -INFINITY;
          }
        }
      }
      ask_keys(next, next_block);
      float best[Traits::kRowSets];
#pragma unroll
      for (int r = 0; r < Traits::kRowSets; ++r) {
        best[r] = kNoScore;
#pragma unroll
        for (int u = 0; u < Traits::kTiles; ++u) {
#pragma unroll
          for (int i = 0; i < 4; ++i) best[r] = fmaxf(best[r], score[u][r][i]);
        }
        best[r] = fmaxf(best[r], __shfl_xor_sync(kFullWarp, best[r], 1));
        best[r] = fmaxf(best[r], __shfl_xor_sync(kFullWarp, best[r], 2));
      }
      follow(acc, best, v_scale, t);
      pieces.wait_values();
#pragma unroll
      for (int u = 0; u < Traits::kTiles; ++u) {
        uint32_t weight[Traits::kOutTiles][2];
        if (clean[u]) {
          weigh<false>(acc, v_params[u], score[u], weight);
        } else {
          weigh<true>(acc, v_params[u], score[u], weight);
        }
        add_values(acc, pieces.values(u), weight);
      }
      ask_values(next, next_block);
      token += Traits::kStep;
#pragma unroll
      for (int u = 0; u < Traits::kTiles; ++u) block[u] = next_block[u];
    }
  }
};

// The call's own keys or values, of this block's head, behind `stored` tokens.
template <class Traits>
__device__ __forceinline__ Source<typename Traits::Element> own_source(const AttentionCall& p,
                                                                       bool is_key, int stored,
                                                                       int whole = -1) {
  const int sequence = blockIdx.z, head = blockIdx.y;
  return {p.cache, p.seqs,
          nullptr, is_key ? p.key : p.value,
          is_key,  sequence,
          head,    call_rows(p.seqs, sequence),
          stored,  Paging(p.cache, p.seqs.max_blocks),
          whole};
}

// Appends tokens [from, to) of the call's own, among which a group begins. Afterwards all threads
// of the block find them in the cache.
template <class Traits>
__device__ __noinline__ void append_groups(const AttentionCall& p, AttentionShared<Traits>& shared,
                                           int stored, int from, int to) {
  const auto key = own_source<Traits>(p, true, stored);
  const auto value = own_source<Traits>(p, false, stored);
  const int group = p.cache.group ? p.cache.group : 1 << 30;
  for (int start = from & -group; start < to; start += group) {
    const int end = min(start + group, stored + key.call.count);
    const __half* mean =
        find_mean<Traits::kThreads>(key, start, end, shared.append.scratch, shared.append.mean);
    write_rows<kRowWarps>(key, max(start, from), min(end, to), mean, threadIdx.x / 32);
    write_rows<kRowWarps>(value, max(start, from), min(end, to), nullptr, threadIdx.x / 32);
  }
  __syncthreads();
}

// grid: (row tiles x splits, KV heads, sequences): row tiles are fastest, they share the tokens'
// rows in L2.
template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kShape.blocks)
    attention_kernel(const __grid_constant__ AttentionCall call) {
  const AttentionCall p = Traits::known(call);
  extern __shared__ __align__(16) unsigned char memory[];
  auto& shared = *reinterpret_cast<AttentionShared<Traits>*>(memory);
  const bool leads = threadIdx.x == 0;
  int split = blockIdx.x, row_tile = 0;
  if (p.row_tiles > 1) {
    split = blockIdx.x / p.row_tiles;
    row_tile = p.row_tiles - 1 - int(blockIdx.x % p.row_tiles);  // those that see most are first
  }
  RowTile rows;
  if (!rows.find_rows(p, row_tile, Traits::kRows)) return;
  // Asked for at once: lengths, the first block, the query. What needs none of them comes next.
  const int asked_block =
      load_early(p.seqs.block_table + rows.sequence * p.seqs.block_table_stride);
  const int asked_length = load_early(p.seqs.seq_lens + rows.sequence);
  shared.walked.raw.ask(p, rows);
  const Paging paging(p.cache, p.seqs.max_blocks);
  rows.find_tokens(p, asked_length);
  const int span = rows.end - rows.begin;
  int length = p.divided_by.divide(span + p.splits - 1);
  length = max(p.min_split, (length + Traits::kStep - 1) / Traits::kStep * Traits::kStep);
  // The last block of a sequence that has read its length adds the call's tokens to it.
  const auto readers = [&] {
    return p.counters + gridDim.z * gridDim.y * p.row_tiles + blockIdx.z;
  };
  const auto advance = [&](int read) {
    if (read != int(gridDim.x * gridDim.y) - 1) return;
    *readers() = 0;
    p.advance[blockIdx.z] += call_rows(p.seqs, blockIdx.z).count;
  };
  if (split > 0 && split * length >= span) {
    wait_copies<0>(0);
    if (p.advance) {
      __syncthreads();
      if (leads) advance(atomicAdd(readers(), 1));
    }
    return;
  }
  if (leads) shared.rows = rows;
  if (threadIdx.x < Traits::kRows) shared.views[threadIdx.x] = rows.view(p, threadIdx.x);
  const int begin = rows.begin + split * length, end = min(rows.end, begin + length);
  const int first_block = checked_block(p.cache, asked_block);
  const int g = (threadIdx.x & 31) >> 2, t = threadIdx.x & 3;
  const int first_own = split == 0 ? rows.stored : max(rows.stored, begin);
  const int own_end = end == rows.end ? rows.stored + rows.tokens : end;
  // A call's own tokens are in the cache before the barrier below, or, where a group begins among
  // them, at once.
  const int group = p.cache.group ? p.cache.group : 1 << 30, last_group = (own_end - 1) & -group;
  const bool has_own = p.key.data && first_own < own_end;
  const bool begins = has_own && (last_group >= rows.stored || last_group > first_own);
  if (begins) append_groups(call, shared, rows.stored, first_own, own_end);
  const auto append_own = [&] {  // by half of the warps keys, by half values
    if (!has_own || begins) return;
    constexpr int kHalf = Traits::kWarps / 2;
    const int warp = threadIdx.x / 32, whole = p.seqs.max_blocks == 1 ? first_block : -1;
    const auto own = own_source<Traits>(p, warp < kHalf, rows.stored, whole);
    const bool has_mean = own.is_key && p.cache.group;
    write_rows<kHalf>(own, first_own, own_end,
                      has_mean ? mean_slot(own, first_own & -group) : nullptr, warp % kHalf);
  };
  const int ready = has_own && !begins ? first_own : 1 << 30;
  const int reach = dots_reach<Traits>(p.cache);
  GroupMeans<Traits> means;
  const auto find_means = [&](int from) {
    means.find(p, rows, paging, first_block, from >> paging.group_shift,
               (min(end, from + reach) - 1) >> paging.group_shift, g);
  };
  find_means(begin);
  Walk<Traits> walk(p, shared.rings, rows, paging, first_block, begin, end);
  // As measured: registers that will hold tokens serve the append before, and means are asked for
  // first where little else is on its way.
  constexpr bool kHeld = Traits::kShape.stages == 0, kAlone = kHeld && Traits::kShape.blocks == 1;
  if (kHeld) append_own();
  if (kAlone) means.load(p, rows, paging, t);
  walk.fill(ready);
  if (!kHeld) append_own();
  if (!kAlone) means.load(p, rows, paging, t);
  wait_copies<2 * kMaxStages>(Pieces<Traits>::kGroups * walk.asked);
  prepare_query(p, shared.walked.raw, shared.walked.query, shared.scale);
  __syncthreads();
  walk.fill(1 << 30);
  const int read = p.advance && leads ? atomicAdd(readers(), 1) : 0;
  const Query<Traits> query(shared.walked.query, shared.scale, g, t);
  Accumulator<Traits> acc;
  for (int from = begin;;) {
    means.multiply(query, shared.walked.dots);
    __syncthreads();
    walk.run(shared, query, from >> paging.group_shift, min(end, from + reach), acc);
    from += reach;
    if (from >= end) break;
    find_means(from);
    means.load(p, rows, paging, t);
    __syncthreads();
  }
  merge_warps(shared, acc, g, t);
  const int splits = max(1, (span + length - 1) / length);
  const int64_t unit = (int64_t(blockIdx.z) * gridDim.y + blockIdx.y) * p.row_tiles + row_tile;
  if (p.clustered) {
    finish_cluster(p, shared, split, splits);
  } else if (splits == 1 || merge_splits(p, shared, unit, split, splits)) {
    finish_block(p, shared);
  }
  if (p.advance && leads) advance(read);
}

}  // namespace kvquant::cuda
