// Attention on the 8-bit cache: a block's main loop over one split of the tokens.
//
// A block takes up to 32 query rows (query tokens x heads of one KV head) and one split of the
// tokens; its warps take 16 tokens each in turn. Splits are combined by the last one's block, in
// their order, so that a call's result is the same bit for bit every time. A decode step's own keys
// and values are appended by the blocks that attend to them.
#pragma once

#include "kernels/attention/main_loop.cuh"

namespace kvquant::cuda {

// Adds the young tokens of a split to what is settled of others.
template <class Traits>
__device__ __forceinline__ void run_young(const AttentionCall& p, const CacheView& slabs,
                                          const Paging& paging, AttentionShared<Traits>& shared,
                                          const Query<Traits>& query, int warp, int first_block,
                                          int new_begin, Accumulator<Traits>& acc) {
  if (Traits::kShape.stages > 0) __syncthreads();  // the warps' rings become longer
  AttentionCall call = p;
  call.cache = slabs;
  const auto held = [&](const Slab& slab) {  // of the one sequence and head
    return Strided{rows_of<const uint8_t>(slab, shared.young.sequence, shared.rows.head), 0, 0};
  };
  call.k_codes = held(slabs.k.codes), call.k_params = held(slabs.k.params);
  call.v_codes = held(slabs.v.codes), call.v_params = held(slabs.v.params);
  MainLoop<typename Traits::Appended, Traits, InSlab> loop(call, paging, warp, shared.young);
  const int begin = shared.young.begin, end = shared.young.end;
  loop.find(shared.rows, shared.rings);
  loop.start(shared.rows, first_block, begin, end);
  loop.run(shared, query, 0, end, new_begin, acc);
  acc.template settle<typename Traits::Appended::Value>();
}

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
  using Appended = typename Traits::Appended;
  const CacheView slabs = Traits::kByAge ? young_view(p.cache, p.seqs) : p.cache;
  NewTokensInFlight<Appended> new_tokens(p, slabs, shared.new_tokens, rows.tokens, warp);
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
  const bool begins =
      has_new && (Traits::kByAge ? Ages(p.cache, rows.stored, rows.tokens).opens()
                                 : last_group >= rows.stored || last_group > first_new);
  // The first of the block's new tokens does, no other one: all that is missing is the mean.
  const bool opens = begins && p.cache.mean_group && first_new == rows.stored &&
                     last_group == rows.stored &&
                     open_group(call, slabs, shared.groups, shared.new_tokens, rows.stored,
                                p.seqs.max_blocks == 1 ? first_block : -1);
  if (begins && !opens) {
    using Element = typename Traits::Element;
    using Pair = typename Traits::Pair;
    if constexpr (Traits::kByAge) {
      append_aged<Pair, Element, Traits::kThreads>(call, shared.groups, rows.stored, first_new,
                                                   end_new);
    } else {
      append_groups<Pair, Element, Traits::kThreads>(call, shared.groups, rows.stored, first_new,
                                                     end_new);
    }
  }
  // Tokens that are not in the cache yet.
  const int new_begin = has_new && (!begins || opens) ? first_new : 1 << 30;
  const int new_end = has_new && (!begins || opens) ? end_new : 1 << 30;
  // By age: young tokens have a loop of their own.
  const int age = Traits::kByAge ? chunk_tokens(p.cache) : 0;
  const InSlab young(age, read_from(age, rows.length, rows.tokens), begin, end, sequence);
  const int old_end = Traits::kByAge ? min(end, young.from) : end;
  const int reach = mean_scores_reach<Traits>(p.cache);
  GroupMeans<Traits> means(shared.means, warp);
  const auto ask_means = [&](int from, const InSlab& young) {
    means.ask(p, rows, paging, first_block, from >> paging.group_shift,
              (min(end, from + reach) - 1) >> paging.group_shift, young.any() ? young.end : 0,
              young.hole(), g, t);
  };
  if (Traits::kHeld) ask_means(begin, young);
  new_tokens.begin(new_begin, new_end);
  loop.start(rows, first_block, max(begin, age), old_end);
  if (!Traits::kHeld) ask_means(begin, young);
  const int from_last = Traits::kThreads - 1 - threadIdx.x;
  if (from_last == 0) {
    shared.rows = rows;
    if constexpr (Traits::kByAge) shared.young = young;
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
    const int first_group = (from >> paging.group_shift) - kYoungGroups<Traits>;
    loop.run(shared, query, first_group, min(loop.end, from + reach), new_begin, acc);
    from += reach;
    if (from >= end) break;
    ask_means(from, shared.young);
    __syncthreads();
  }
  if constexpr (Traits::kByAge) {
    acc.template settle<typename Traits::Value>();
    if (shared.young.any()) {
      run_young(p, slabs, paging, shared, query, warp, loop.block[0], new_begin, acc);
    }
  }
  wait_copies<0>(0);  // for those that nobody needed
  const int64_t unit = int64_t(sequence) * gridDim.x + head * p.row_tiles + row_tile;
  if (p.advance && leads) advance(read);
  finish(p, shared, acc, unit, split, combines, warp, g, t);
}

}  // namespace kvquant::cuda
