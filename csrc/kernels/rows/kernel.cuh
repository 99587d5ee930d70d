// Attention of many query rows on Hopper, by the products of a warpgroup (wgmma).
//
// A block takes 32 or 64 query rows (query tokens x heads of one KV head) and one split of the
// tokens, 64 at a time. Keys meet the query as bytes, on the integer tensor cores: of 64 rows first
// with its high bytes, then with its low ones, of 32 with both at once. Values become fp16 in
// shared memory, once a tile. A thread's scores are its weights' operand as they are. Blocks of a
// multiprocessor fill each other's waits.
#pragma once

#include "kernels/attention/new_tokens.cuh"
#include "kernels/rows/finish.cuh"
#include "kernels/rows/means.cuh"

namespace kvquant::cuda {

// grid: (row tiles x KV heads, sequences, splits), as attention_kernel's.
template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kShape.blocks)
    rows_kernel(const __grid_constant__ AttentionCall p, const __grid_constant__ RowsMaps maps) {
  constexpr int kDim = Traits::kDim, kStages = Traits::kStages, kThreadRows = Traits::kThreadRows;
  using Values = RowsValues<Traits>;
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& shared = *reinterpret_cast<RowsShared<Traits>*>(memory);
  const int warp = uniform(threadIdx.x / 32), g = (threadIdx.x & 31) >> 2, t = threadIdx.x & 3;
  const int sequence = blockIdx.y, head = blockIdx.x / p.row_tiles;
  const int row_tile = p.row_tiles - 1 - int(blockIdx.x % p.row_tiles);  // the longest are first
  // Of a step the launch before is its append, which may run still: its rows, and the mean that it
  // takes, are waited for where they are read. It has waited for all that came before it.
  if (!p.key.data) wait_for_writes();
  let_next_launch_start();
  RowTile rows;
  if (!rows.find_rows(p, sequence, head, row_tile, Traits::kRows)) return;
  const int asked_length = load_early(p.seqs.seq_lens + rows.sequence);
  const int row = warp * Traits::kRowsPerWarp + g;  // the thread's first one
  RowsOfThread<Traits> own;
  own.ask(p, rows, row, t);
  const Paging paging(p.cache, p.seqs.max_blocks);
  rows.find_tokens(p, uniform(asked_length));
  rows.begin &= -kRowsTile;
  const int span = rows.end - rows.begin, length = rows.split_length(p, kRowsTile);
  // As attention_kernel's: the last split is in the last layer, whichever it is.
  const int splits = gridDim.z > 1 && span > 0 ? (span - 1) / length + 1 : 1;
  const bool is_last = blockIdx.z == gridDim.z - 1;
  const int split = is_last ? splits - 1 : blockIdx.z;
  // The last block of a sequence that has read its length adds the call's tokens to it: the append
  // reads it, too, and another launch may still use the counters.
  const auto count_reader = [&] {
    if (!p.advance) return;
    __syncthreads();  // all warps have read it
    if (threadIdx.x > 0) return;
    wait_for_writes();
    int* const readers = p.counters + sequence;
    if (atomicAdd(readers, 1) < int(gridDim.x * gridDim.z) - 1) return;
    *readers = 0;
    p.advance[sequence] = asked_length + rows.tokens;
  };
  if (!is_last && split >= splits - 1) return count_reader();
  const int begin = rows.begin + split * length, end = min(rows.end, begin + length);
  if (threadIdx.x == 0) {
#pragma unroll
    for (int i = 0; i < kStages; ++i) init_barrier(shared_address(&shared.full[i]), 1);
    publish_barriers();
    shared.rows = rows;
  }
  __syncthreads();
  // Tiles between them need no look at single scores.
  const int clean_begin = p.softcap == 0.f && !p.alibi_slopes ? rows.all_begin : 1 << 30;
  const RowsSpan of{begin,
                    end,
                    max(rows.begin, rows.start),
                    clean_begin,
                    rows.all_end - kRowsTile,
                    p.key.data ? rows.stored : 1 << 30};
  const RowsAges ages = Traits::kByAge ? RowsAges(p, rows) : RowsAges();
  RowsPipeline<Traits> pipeline(p, maps, paging, shared, rows, of, ages, warp);
  if (threadIdx.x < Traits::kRows) shared.views[threadIdx.x] = rows.view(p, threadIdx.x);
  float sum[kThreadRows], gain[kThreadRows];
  own.prepare(p, shared.query, sum, gain, row, g, t);
  publish_shared();
  __syncthreads();

  RowsAccumulator<Traits> acc;
  RowsMeans<Traits> means;
  const int last_group = (end - 1) >> paging.group_shift;
  const uint64_t query = Swizzle<kDim>::descriptor(shared_address(shared.query.bytes[0]));
  const uint64_t values =
      Swizzle<128>::descriptor(shared_address(shared.values), Values::kHalfBytes);
  int stage = 0;
  uint32_t phase = 0;
  // Waits for the tile at `token` and prepares its params and keys, which all threads have then at
  // the next barrier.
  bool are_young = false;
  const auto await = [&](int token) {
    wait_barrier(shared_address(&shared.full[stage]), phase);
    if constexpr (Traits::kByAge) are_young = ages.are_young(token);
    prepare_params(shared, stage, token, of, are_young);
    if constexpr (Traits::kUnpacksKeys) {
      if (!are_young) {
        unpack_keys<Traits>(shared.k[stage]);
        publish_shared();
      }
    }
  };
  if (begin < end) await(begin);
#pragma unroll 1
  for (int token = begin; token < end; token += kRowsTile) {
    __syncthreads();  // params are there, and nobody reads the last tile's values any more
    const uint64_t codes =
        Swizzle<kDim>::descriptor(shared_address(shared.k[0])) + ((stage * kRowsTile * kDim) >> 4);
    typename Values::Half halves[2];
    Values::ask(shared, stage, 0, are_young, halves[0]);
    int c[32];
    multiply_query<kDim, false>(c, query, codes);
    Values::ask(shared, stage, 1, are_young, halves[1]);
    Values::convert(shared, 0, are_young, halves[0]);
    float dot[kThreadRows];
    means.of(p, rows, paging, shared.query, token, last_group, of, warp, dot);
    if constexpr (kThreadRows == 2) {  // the low bytes are another matrix
      wait_products<0>();
      keep(c);
#pragma unroll
      for (int i = 0; i < 32; ++i) c[i] *= 256;
      multiply_query<kDim, true>(c, query + (RowsQuery<Traits>::kBytes >> 4), codes);
    }
    Values::convert(shared, 1, are_young, halves[1]);
    wait_products<0>();
    keep(c);
    RowScores<Traits> y;  // over gain
#pragma unroll
    for (int i = 0; i < kRowsTile / 4; ++i) {
      const RowAffine key = shared.keys[i / 2 * 8 + 2 * t + i % 2];
#pragma unroll
      for (int r = 0; r < kThreadRows; ++r) {
        const int at = i / 2 * 4 + i % 2;
        const int product = kThreadRows == 2 ? c[at + 2 * r] : 256 * c[at] + c[at + 2];
        y[r][i] = fmaf(key.scale, float(product), fmaf(key.offset, sum[r], dot[r]));
      }
    }
    if (shared.is_clean[stage]) {
      acc.weigh(y, gain);
    } else {
      mask_rows(p, shared, token, stage, row, t, gain, y);
      float one[kThreadRows];
#pragma unroll
      for (float& by : one) by = 1.f;
      acc.weigh(y, one);
    }
    publish_shared();
    __syncthreads();  // all values are there, and nobody needs the stage any more
    acc.add(values);
    pipeline.load(token + kStages * kRowsTile, stage);
    if (++stage == kStages) stage = 0, phase ^= 1;
    if (token + kRowsTile < end) await(token + kRowsTile);
    acc.wait();
  }
  const int64_t unit = int64_t(sequence) * gridDim.x + head * p.row_tiles + row_tile;
  wait_for_writes();
  count_reader();
  finish_rows(p, shared.rows, acc, unit, split, splits, row, t);
}

}  // namespace kvquant::cuda
