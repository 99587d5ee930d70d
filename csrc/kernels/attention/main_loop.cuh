// A warp's loop over the tokens of its block's split.
#pragma once

#include "kernels/attention/combine.cuh"

namespace kvquant::cuda {

// Softcap, ALiBi and the mask on a tile's scores.
// Tokens that no row sees may hold anything: their params become zeros. So do those of values that
// are not finite, and the scores of rows that see them become NaN.
template <class Traits, class Value>
__device__ __forceinline__ void mask_scores(const AttentionCall& p,
                                            const AttentionShared<Traits>& shared, int token, int g,
                                            int t, TileParams<Value>& v_params,
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

// Products of the query's rows g + 8 r with the groups' means, from `first_group` on.
template <class Traits>
struct MeanScores {
  const float* scores;
  uint32_t address;  // kTakesWhole: of `scores` in shared memory

  __device__ __forceinline__ MeanScores(const AttentionShared<Traits>& shared, int first_group,
                                        int g) {
    scores = &shared.mean_scores[0][g] - first_group * Traits::kRows;
    if constexpr (Traits::kTakesWhole) {
      address = kept(shared_address(&shared.mean_scores[0][g]) -
                     first_group * Traits::kRows * sizeof(float));
    }
  }
  __device__ __forceinline__ float at(int group, int r) const {
    const int i = group * Traits::kRows + 8 * r;
    if constexpr (Traits::kTakesWhole) {
      return load_shared_float(address + i * sizeof(float));
    } else {
      return scores[i];
    }
  }
};

template <int kTiles, int kRowSets>
__device__ __forceinline__ void find_best(const float (&score)[kTiles][kRowSets][4],
                                          float (&best)[kRowSets]) {
#pragma unroll
  for (int r = 0; r < kRowSets; ++r) {
    best[r] = kNoScore;
#pragma unroll
    for (int u = 0; u < kTiles; ++u) {
#pragma unroll
      for (int i = 0; i < 4; ++i) best[r] = fmaxf(best[r], score[u][r][i]);
    }
  }
}

// A warp's way through tokens up to `end`: every kWarps-th piece of one or two tiles, the next ones
// on their way while one is worked on. Block: the traits of the block.
template <class Traits, class Block = Traits, class Tokens = InBlocks>
struct MainLoop {
  using Place = typename LoadPipeline<Traits>::Place;
  using Value = typename Traits::Value;
  using TileProducts = Products<Block, Traits::template kKeyColumns<typename Traits::Key>>;

  const AttentionCall& p;
  const Paging& paging;
  const Tokens tokens;
  LoadPipeline<Traits> pipeline;
  const int32_t* table;  // of the sequence
  // Tiles from clean_begin on and up to clean_end need no look at single scores.
  int clean_begin, clean_end;
  int end, lane_end;  // the same; of lane_end the compiler does not see that all lanes have one
  int warp, token;    // nor of token
  int block[Traits::kTiles];  // of the piece that was asked for last, -1: none

  __device__ __forceinline__ MainLoop(const AttentionCall& p, const Paging& paging, int warp,
                                      const Tokens& tokens = {})
      : p(p), paging(paging), tokens(tokens), pipeline(p), warp(warp) {}

  // Works out what needs no lengths.
  __device__ __forceinline__ void find(const RowTile& rows, unsigned char* rings) {
    find_table(rows.sequence);
    pipeline.find(rows.head, rings, p.stages);
  }
  __device__ __forceinline__ void find_table(int sequence) {
    table = p.seqs.block_table + sequence * p.seqs.block_table_stride;
  }
  __device__ __forceinline__ void find_clean(const RowTile& rows) {
    clean_begin = p.softcap == 0.f && !p.alibi_slopes ? rows.all_begin : 1 << 30;
    clean_end = rows.all_end - kTile;
  }
  // From `begin` on: asks for the first pieces, as many as have room.
  __device__ __forceinline__ void start(const RowTile& rows, int first_block, int begin, int end) {
    this->end = end, lane_end = int(kept(end));
    token = int(kept(begin + warp * kTile * Traits::kTiles));
#pragma unroll
    for (int u = 0; u < Traits::kTiles; ++u) block[u] = tokens.block(first_block);
    for (int i = 0; i < pipeline.stages(); ++i) {
      const int at = token + i * Traits::kStep;
      find_blocks(at, block);
      Place places[Traits::kTiles];
      find_places(at, block, places);
      for_tiles(at, [&](int u) { pipeline.load_keys(u, places[u]); });
      for_tiles(at, [&](int u) { pipeline.load_values(u, places[u]); });
      pipeline.commit_stage();
    }
    find_clean(rows);
  }

  // Blocks of the piece at `at`. Nothing to look up where a sequence has one.
  __device__ __forceinline__ void find_blocks(int at, int (&found)[Traits::kTiles]) const {
    if (p.seqs.max_blocks == 1) return;
#pragma unroll
    for (int u = 0; u < Traits::kTiles; ++u) {
      const int index = min(tokens.token(at + u * kTile) >> paging.shift, p.seqs.max_blocks - 1);
      found[u] = tokens.block(checked_block(p.cache, load_word(table, index)));
    }
  }
  __device__ __forceinline__ void find_places(int at, const int (&blocks)[Traits::kTiles],
                                              Place (&places)[Traits::kTiles]) const {
#pragma unroll
    for (int u = 0; u < Traits::kTiles; ++u) {
      places[u] = pipeline.place(blocks[u], tokens.row(paging, at + u * kTile));
    }
  }
  __device__ __forceinline__ void mask_tile(const AttentionShared<Block>& shared, int at,
                                            bool usable, int g, int t, TileParams<Value>& v_params,
                                            float (&score)[Traits::kRowSets][4]) const {
    if (at < end && usable) {
      return mask_scores(p, shared, tokens.token(at), g, t, v_params, score);
    }
    v_params = {};
#pragma unroll
    for (int r = 0; r < Traits::kRowSets; ++r) {
#pragma unroll
      for (int i = 0; i < 4; ++i) score[r][i] = -INFINITY;
    }
  }
  // Takes the pieces before `until`. shared.mean_scores are of groups from first_group on; tokens
  // from new_begin on are not in the cache yet.
  __device__ __forceinline__ void run(const AttentionShared<Block>& shared,
                                      const Query<Block>& query, int first_group, int until,
                                      int new_begin, Accumulator<Block>& acc) {
    const int g = query.g, t = query.t;
    const MeanScores<Block> mean_scores(shared, first_group, g);
    if constexpr (Traits::kTakesWhole && Tokens::kInOrder) {
      take_whole(shared, query, mean_scores, until, new_begin, acc);
    }
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
      TileParams<Value> v_params[Traits::kTiles];
#pragma unroll
      for (int u = 0; u < Traits::kTiles; ++u) {
        const int at = token + u * kTile;
        float dot[Traits::kRowSets];
#pragma unroll
        for (int r = 0; r < Traits::kRowSets; ++r) {
          dot[r] = mean_scores.at(at >> paging.group_shift, r);
        }
        const int first = tokens.token(at);
        if constexpr (std::is_same_v<Traits, typename Block::Appended>) {
          if (first + kTile > new_begin) pipeline.take_new(u, first, shared.new_tokens);
        }
        const auto& keys = pipeline.keys(u);
        TileProducts products;
        mma_qk<Block>(keys, query, products);
        scale_products(products, keys.params, query, dot, score[u]);
        v_params[u] = pipeline.value_params(u);
        const bool usable = pipeline.usable(u, block[u]);
        if (first < clean_begin || first > clean_end || !usable) {
          mask_tile(shared, at, usable, g, t, v_params[u], score[u]);
        }
        v_scale = fmaxf(v_scale, v_params[u].largest_scale());
      }
      for_tiles(next, [&](int u) { pipeline.load_keys(u, places[u]); });
      float best[Traits::kRowSets];
      find_best(score, best);
      acc.rescale(best, v_scale, t);
#pragma unroll
      for (int u = 0; u < Traits::kTiles; ++u) acc.add(score[u], v_params[u], pipeline.values(u));
      for_tiles(next, [&](int u) { pipeline.load_values(u, places[u]); });
      pipeline.commit_stage();
      if (token / Traits::kStep % Accumulator<Block>::kFlush == 0) acc.template flush<Value>();
      token += Traits::kStep;
#pragma unroll
      for (int u = 0; u < Traits::kTiles; ++u) block[u] = next_block[u];
    }
  }
  // Takes the pieces that need no look at single tokens, as long as there are some: of a sequence
  // in one block, seen by every row, stored before the call.
  __device__ __forceinline__ void take_whole(const AttentionShared<Block>& shared,
                                             const Query<Block>& query,
                                             const MeanScores<Block>& mean_scores, int until,
                                             int new_begin, Accumulator<Block>& acc) {
    if (p.seqs.max_blocks > 1 || token < clean_begin || !pipeline.usable(0, block[0])) return;
    const int last =
        min(min(until - 1, clean_end), new_begin - kTile) - (Traits::kTiles - 1) * kTile;
    Place places[Traits::kTiles];
    find_places(token, block, places);
#pragma unroll
    for (int u = 0; u < Traits::kTiles; ++u) places[u] = pipeline.of_lane(places[u]);
    while (token <= last) {
#pragma unroll
      for (int u = 0; u < Traits::kTiles; ++u) pipeline.advance(places[u], Traits::kStep);
      const int next = token + Traits::kStep;
      float score[Traits::kTiles][Traits::kRowSets][4], v_scale = 0.f;
      TileProducts products[Traits::kTiles];
#pragma unroll
      for (int u = 0; u < Traits::kTiles; ++u) {
        mma_qk<Block>(pipeline.keys(u), query, products[u]);
      }
      for_tiles(next, [&](int u) { pipeline.load_lane_keys(u, places[u]); });
#pragma unroll
      for (int u = 0; u < Traits::kTiles; ++u) {
        float dot[Traits::kRowSets];
#pragma unroll
        for (int r = 0; r < Traits::kRowSets; ++r) {
          dot[r] = mean_scores.at((token + u * kTile) >> paging.group_shift, r);
        }
        scale_products(products[u], pipeline.keys(u).params, query, dot, score[u]);
        v_scale = fmaxf(v_scale, pipeline.value_params(u).largest_scale());
      }
      for_tiles(next, [&](int u) { pipeline.load_lane_key_params(u, places[u]); });
      float best[Traits::kRowSets];
      find_best(score, best);
      acc.rescale(best, v_scale, query.t);
#pragma unroll
      for (int u = 0; u < Traits::kTiles; ++u) {
        acc.add(score[u], pipeline.value_params(u), pipeline.values(u));
      }
      for_tiles(next, [&](int u) { pipeline.load_lane_values(u, places[u]); });
      if (token / Traits::kStep % Accumulator<Block>::kFlush == 0) acc.template flush<Value>();
      token = next;
    }
    // Worked out again: so the loop has their registers.
    int sequence = shared.rows.sequence, head = shared.rows.head;
    asm volatile("" : "+r"(sequence), "+r"(head));
    find_table(sequence);
    pipeline.find_head(head);
    find_clean(shared.rows);
  }
  // Calls f with the number of each tile of the piece at `at` that begins before the end.
  template <class F>
  __device__ __forceinline__ void for_tiles(int at, F&& f) const {
#pragma unroll
    for (int u = 0; u < Traits::kTiles; ++u) {
      if (at + u * kTile >= lane_end) break;
      f(u);
    }
  }
};

}  // namespace kvquant::cuda
