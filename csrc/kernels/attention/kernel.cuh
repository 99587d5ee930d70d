// Attention on the 8-bit cache: a block's main loop over one split of the tokens.
//
// A block takes up to 32 query rows (query tokens x heads of one KV head) and one split of the
// tokens; its warps take 16 tokens each in turn. Splits are combined by the last one's block, in
// their order, so that a call's result is the same bit for bit every time. A decode step's own keys
// and values are appended by the blocks that attend to them.
#pragma once

#include "kernels/attention/combine.cuh"

namespace kvquant::cuda {

// Softcap, ALiBi and the mask on a tile's scores.
// Tokens that no row sees may hold anything: their params become zeros. So do those of values that
// are not finite, and the scores of rows that see them become NaN.
template <class Traits>
__device__ __forceinline__ void mask_scores(const AttentionCall& p,
                                            const AttentionShared<Traits>& shared, int token, int g,
                                            int t, TileParams<typename Traits::Value>& v_params,
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
  const int begin = max(shared.rows.begin, shared.rows.start), end = shared.rows.end;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int j = token + 4 * t + i;
    const bool seen = j >= begin && j < end;
    if (seen && v_params.scale(i) <= kMaxAbs) continue;
    v_params.set(i, {});
#pragma unroll
    for (int r = 0; r < Traits::kRowSets; ++r) {
      if (seen && score[r][i] != -INFINITY) score[r][i] = NAN;
    }
  }
}

// A warp's way through tokens up to `end`: every kWarps-th piece of one or two tiles, the next ones
// on their way while one is worked on.
template <class Traits>
struct MainLoop {
  using Place = typename LoadPipeline<Traits>::Place;

  const AttentionCall& p;
  const Paging& paging;
  LoadPipeline<Traits> pipeline;
  const int32_t* table;  // of the sequence
  // Tiles from clean_begin on and up to clean_end need no look at single scores.
  int clean_begin, clean_end;
  int end, lane_end;  // the same; of lane_end the compiler does not see that all lanes have one
  int warp, token;
  int block[Traits::kTiles];  // of the piece that was asked for last, -1: none

  __device__ __forceinline__ MainLoop(const AttentionCall& p, const Paging& paging, int warp)
      : p(p), paging(paging), pipeline(p), warp(warp) {}

  // Works out what needs no lengths.
  __device__ __forceinline__ void find(const RowTile& rows, unsigned char* rings) {
    table = p.seqs.block_table + rows.sequence * p.seqs.block_table_stride;
    pipeline.find(rows.head, rings, p.stages);
  }
  // From `begin` on: asks for the first pieces, as many as have room.
  __device__ __forceinline__ void start(const RowTile& rows, int first_block, int begin, int end) {
    this->end = end, lane_end = int(kept(end));
    token = begin + warp * kTile * Traits::kTiles;
#pragma unroll
    for (int u = 0; u < Traits::kTiles; ++u) block[u] = first_block;
    for (int i = 0; i < pipeline.stages(); ++i) {
      const int at = token + i * Traits::kStep;
      find_blocks(at, block);
      Place places[Traits::kTiles];
      find_places(at, block, places);
      load_keys(at, places);
      load_values(at, places);
    }
    clean_begin = p.softcap == 0.f && !p.alibi_slopes ? rows.all_begin : 1 << 30;
    clean_end = rows.all_end - kTile;
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
  __device__ __forceinline__ void find_places(int at, const int (&blocks)[Traits::kTiles],
                                              Place (&places)[Traits::kTiles]) const {
#pragma unroll
    for (int u = 0; u < Traits::kTiles; ++u) {
      places[u] = pipeline.place(blocks[u], (at + u * kTile) & paging.mask);
    }
  }
  __device__ __forceinline__ void load_keys(int at, const Place (&places)[Traits::kTiles]) {
#pragma unroll
    for (int u = 0; u < Traits::kTiles; ++u) {
      if (at + u * kTile >= lane_end) break;
      pipeline.load_keys(u, places[u]);
    }
  }
  __device__ __forceinline__ void load_values(int at, const Place (&places)[Traits::kTiles]) {
#pragma unroll
    for (int u = 0; u < Traits::kTiles; ++u) {
      if (at + u * kTile >= lane_end) break;
      pipeline.load_values(u, places[u]);
    }
    pipeline.commit_stage();
  }
  __device__ __forceinline__ void mask_tile(const AttentionShared<Traits>& shared, int at,
                                            bool usable, int g, int t,
                                            TileParams<typename Traits::Value>& v_params,
                                            float (&score)[Traits::kRowSets][4]) const {
    if (at < end && usable) return mask_scores(p, shared, at, g, t, v_params, score);
    v_params = {};
#pragma unroll
    for (int r = 0; r < Traits::kRowSets; ++r) {
#pragma unroll
      for (int i = 0; i < 4; ++i) score[r][i] = -INFINITY;
    }
  }
  // Takes the pieces before `until`. shared.mean_scores are of groups from first_group on; tokens
  // from new_begin on are not in the cache yet.
  __device__ __forceinline__ void run(const AttentionShared<Traits>& shared,
                                      const Query<Traits>& query, int first_group, int until,
                                      int new_begin, Accumulator<Traits>& acc) {
    const int g = query.g, t = query.t;
    const float* const mean_scores = &shared.mean_scores[0][g] - first_group * Traits::kRows;
    while (token < until) {
      const int next = token + pipeline.stages() * Traits::kStep;
      int next_block[Traits::kTiles];
#pragma unroll
      for (int u = 0; u < Traits::kTiles; ++u) next_block[u] = block[u];
      find_blocks(next, next_block);
      Place places[Traits::kTiles];
      find_places(next, next_block, places);
      pipeline.wait_stage();
      float score[Traits::kTiles][Traits::kRowSets][4], v_scale = 0.f;
      TileParams<typename Traits::Value> v_params[Traits::kTiles];
#pragma unroll
      for (int u = 0; u < Traits::kTiles; ++u) {
        const int at = token + u * kTile;
        float dot[Traits::kRowSets];
#pragma unroll
        for (int r = 0; r < Traits::kRowSets; ++r) {
          dot[r] = mean_scores[(at >> paging.group_shift) * Traits::kRows + 8 * r];
        }
        if (at + kTile > new_begin) pipeline.take_new(u, at, shared.new_tokens);
        mma_qk(pipeline.keys(u), query, dot, score[u]);
        v_params[u] = pipeline.value_params(u);
        const bool usable = pipeline.usable(u, block[u]);
        if (at < clean_begin || at > clean_end || !usable) {
          mask_tile(shared, at, usable, g, t, v_params[u], score[u]);
        }
        v_scale = fmaxf(v_scale, v_params[u].largest_scale());
      }
      load_keys(next, places);
      float best[Traits::kRowSets];
#pragma unroll
      for (int r = 0; r < Traits::kRowSets; ++r) {
        best[r] = kNoScore;
#pragma unroll
        for (int u = 0; u < Traits::kTiles; ++u) {
#pragma unroll
          for (int i = 0; i < 4; ++i) best[r] = fmaxf(best[r], score[u][r][i]);
        }
      }
      acc.rescale(best, v_scale, t);
#pragma unroll
      for (int u = 0; u < Traits::kTiles; ++u) acc.add(score[u], v_params[u], pipeline.values(u));
      load_values(next, places);
      if (token / Traits::kStep % Accumulator<Traits>::kFlush == 0) acc.flush();
      token += Traits::kStep;
#pragma unroll
      for (int u = 0; u < Traits::kTiles; ++u) block[u] = next_block[u];
    }
  }
};

// grid: (row tiles x KV heads, sequences, splits): row tiles are fastest, they share the tokens'
// rows in L2.
template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kShape.blocks)
    attention_kernel(const __grid_constant__ AttentionCall call) {
  const AttentionCall p = Traits::known(call);
  extern __shared__ __align__(128) unsigned char memory[];
  auto& shared = *reinterpret_cast<AttentionShared<Traits>*>(memory);
  const bool leads = threadIdx.x == 0;
  // The call comes from memory in lines that would be waited for one by one: each warp asks for
  // one.
  shared.parameters[threadIdx.x / 32] =
      load_parameter(&call, min(threadIdx.x / 32 * 64, uint32_t(sizeof(call)) - 4));
  const int sequence = blockIdx.y;
  int head = blockIdx.x, row_tile = 0;
  if (p.row_tiles > 1) {
    head = blockIdx.x / p.row_tiles;
    row_tile = p.row_tiles - 1 - int(blockIdx.x % p.row_tiles);  // those that see most are first
  }
  wait_for_previous_launch();
  RowTile rows;
  if (!rows.find_rows(p, sequence, head, row_tile, Traits::kRows)) return;
  // Asked for at once: lengths, the first block, the query. What needs none of them comes next.
  const int asked_block =
      load_early(p.seqs.block_table + rows.sequence * p.seqs.block_table_stride);
  const int asked_length = load_early(p.seqs.seq_lens + rows.sequence);
  const int warp = uniform(threadIdx.x / 32);
  NewTokensInFlight<Traits> new_tokens(p, shared.new_tokens, rows.tokens, warp);
  shared.raw.ask(p, rows, warp);
  close_copies();
  const Paging paging(p.cache, p.seqs.max_blocks);
  MainLoop<Traits> loop(p, paging, warp);
  loop.find(rows, shared.rings);
  rows.find_tokens(p, uniform(asked_length));
  const int first_block = checked_block(p.cache, uniform(asked_block));
  new_tokens.ask_mean(rows.stored, p.seqs.max_blocks == 1 ? first_block : -1);
  const int span = rows.end - rows.begin, length = rows.split_length(p, Traits::kStep);
  // The last block of a sequence that has read its length adds the call's tokens to it.
  const auto readers = [&] { return p.counters + sequence; };
  const auto advance = [&](int read) {
    if (read != int(gridDim.x * gridDim.z) - 1) return;  // appends have one row tile
    *readers() = 0;
    p.advance[sequence] = asked_length + rows.tokens;
  };
  // A sequence's last split, which may be short, comes in the grid's last layer: so long ones start
  // first, and blocks end together.
  const bool combines = blockIdx.z == gridDim.z - 1;
  int split = blockIdx.z;
  if (combines) {
    split = gridDim.z > 1 && span > 0 ? (span - 1) / length : 0;
  } else if ((split + 1) * length >= span) {
    wait_copies<0>(0);
    if (p.advance) {
      __syncthreads();
      if (leads) advance(atomicAdd(readers(), 1));
    }
    return;
  }
  const int begin = rows.begin + split * length, end = min(rows.end, begin + length);
  const int g = (threadIdx.x & 31) >> 2, t = threadIdx.x & 3;
  const int first_new = split == 0 ? rows.stored : max(rows.stored, begin);
  const int end_new = end == rows.end ? rows.stored + rows.tokens : end;
  const int group = p.cache.mean_group ? p.cache.mean_group : 1 << 30,
            last_group = (end_new - 1) & -group;
  const bool has_new = p.key.data && first_new < end_new;
  const bool begins = has_new && (last_group >= rows.stored || last_group > first_new);
  // The first of the block's new tokens does, no other one: all that is missing is the mean.
  const bool opens =
      begins && p.cache.mean_group && first_new == rows.stored && last_group == rows.stored;
  if (opens) {
    open_group<Traits>(call, shared.groups, shared.new_tokens, rows.stored, end_new,
                       p.seqs.max_blocks == 1 ? first_block : -1);
  } else if (begins) {
    append_groups<Traits>(call, shared.groups, rows.stored, first_new, end_new);
  }
  // Tokens that are not in the cache yet.
  const int new_begin = has_new && (!begins || opens) ? first_new : 1 << 30;
  const int new_end = has_new && (!begins || opens) ? end_new : 1 << 30;
  const int reach = mean_scores_reach<Traits>(p.cache);
  GroupMeans<Traits> means(shared.means, warp);
  const auto ask_means = [&](int from) {
    means.ask(p, rows, paging, first_block, from >> paging.group_shift,
              (min(end, from + reach) - 1) >> paging.group_shift, g, t);
  };
  if (Traits::kHeld) ask_means(begin);
  new_tokens.begin(new_begin, new_end);
  loop.start(rows, first_block, begin, end);
  if (!Traits::kHeld) ask_means(begin);
  const int from_last = Traits::kThreads - 1 - threadIdx.x;
  if (from_last == 0) {
    shared.rows = rows;
    shared.new_tokens.begin = new_begin, shared.new_tokens.end = new_end;
  }
  if (from_last < Traits::kRows) shared.views[from_last] = rows.view(p, from_last);
  // For the query and the first own row: means and tokens were asked for after them.
  const int later = Traits::kHeld ? 1 : LoadPipeline<Traits>::kGroups * loop.pipeline.stages();
  wait_copies<kMaxStages + 1>(later + 1);
  prepare_query(p, shared.raw, warp, rows.count, shared.query, shared.scale);
  new_tokens.quantize(later);
  __syncthreads();
  new_tokens.write();
  const int read = p.advance && leads ? atomicAdd(readers(), 1) : 0;
  const Query<Traits> query(shared.query, shared.scale, g, t);
  Accumulator<Traits> acc;
  for (int from = begin;;) {
    means.multiply(query, shared.mean_scores);
    __syncthreads();
    loop.run(shared, query, from >> paging.group_shift, min(end, from + reach), new_begin, acc);
    from += reach;
    if (from >= end) break;
    ask_means(from);
    __syncthreads();
  }
  wait_copies<0>(0);  // for those that nobody needed
  const int64_t unit = int64_t(sequence) * gridDim.x + head * p.row_tiles + row_tile;
  if (p.advance && leads) advance(read);
  finish(p, shared, acc, unit, split, combines, warp, g, t);
}

}  // namespace kvquant::cuda
