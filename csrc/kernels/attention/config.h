// Shapes of the attention kernel and how a call is cut into blocks: pure functions of numbers.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace kvquant::cuda {

constexpr int kAttentionWarps = 8;
constexpr int kAttentionThreads = kAttentionWarps * 32;
constexpr int kTile = 16;                       // tokens a warp takes at once
constexpr int kStep = kTile * kAttentionWarps;  // tokens a block takes at once
constexpr int kMinSplit = 256;                  // tokens; shorter splits cost more than they gain
constexpr int kMaxSplits = 256;                 // of a sequence: what a merge has room for
constexpr int kBlockCost = 256;                 // tokens' worth of a block's other work
constexpr int kMaxStages = 4;
constexpr int kQueryPad = 4;  // halves: a fragment's 8-byte reads then meet no bank twice

// Query rows a block takes. 32 rows of more channels exceed the registers.
constexpr int max_rows(int head_dim) { return head_dim <= 128 ? 32 : 16; }

// Blocks that a multiprocessor's registers hold.
constexpr int min_blocks(int head_dim, int rows, bool float32) {
  const int accumulators = head_dim / 16 * 4 * (float32 ? 2 : rows / 8);  // registers
  return accumulators <= 32 ? 2 : 1;
}

// A warp's tile: keys, values, their params and the group's mean.
constexpr int stage_bytes(int head_dim) {
  return kAttentionWarps * ((2 * head_dim + 8) * kTile + 2 * head_dim);
}
// Rows that are merged over the warps at once. Four of them do not leave room for a stage of 256
// channels where a block may have 99 KB (sm_86, 89, 120).
constexpr int merge_rows(int head_dim) { return head_dim > 128 ? 2 : 4; }

// Shared memory besides the ring, rounded up: query, result and merge rows, items, row states.
constexpr int fixed_bytes(int head_dim, int rows, bool float32) {
  return ((float32 ? 16 : rows) + rows) * (head_dim + kQueryPad) * 2 + rows * head_dim * 4 +
         kAttentionWarps * merge_rows(head_dim) * (std::min(head_dim, 128) + 4) * 4 +
         rows * (kAttentionWarps + 1) * 16 + 256;
}

struct AttentionPlan {
  int head_dim;   // of the instance: a multiple of 64 that covers both head_dims
  int rows;       // of a block
  int row_tiles;  // of a sequence and KV head
  int splits;     // most blocks along the tokens; 0: no instance fits shared memory
  int64_t partial_floats, counters;
};

// Floats that a block leaves for the merge: its rows' accumulators, maxima and sums.
constexpr int partial_floats(int head_dim, int rows) { return rows * (head_dim + 2); }

// The splits that finish soonest: waves of `slots` blocks, each as long as its tokens and what a
// block costs besides (prologue and merge).
inline int choose_splits(int64_t units, int64_t slots, int capacity) {
  const int most = int(std::min<int64_t>(
      {kMaxSplits, (capacity + kMinSplit - 1) / kMinSplit, 8 * slots / units + 1}));
  int best = 1;
  double best_cost = 1e30;
  for (int splits = 1; splits <= most; ++splits) {
    const int length = ((capacity + splits - 1) / splits + kStep - 1) / kStep * kStep;
    const double waves = double(units) * ((capacity + length - 1) / length) / double(slots);
    const double rounds = waves <= 4 ? std::ceil(waves) : waves + 0.5;  // later they drift apart
    const double cost = rounds * (length + kBlockCost);
    if (cost < best_cost) best_cost = cost, best = splits;
  }
  return best;
}

// Stages of the ring that shared memory allows: `limit` bytes a block, `total` a multiprocessor.
inline int choose_stages(int head_dim, int rows, bool float32, int limit, int total) {
  const int kept = limit > 64 << 10 ? 1024 : 0;  // by the driver, of a block, from sm_80 on
  const int fixed = fixed_bytes(head_dim, rows, float32) + kept;
  for (int blocks = min_blocks(head_dim, rows, float32); blocks >= 1; --blocks) {
    const int stages = (std::min(limit + kept, total / blocks) - fixed) / stage_bytes(head_dim);
    if (stages >= 2 || blocks == 1) return std::min(kMaxStages, stages);
  }
  return 0;
}

// capacity: most tokens of a sequence; shared_limit: bytes of shared memory a block may have.
inline AttentionPlan plan_attention(int batch, int tokens, int q_heads, int kv_heads, int k_dim,
                                    int v_dim, bool float32, int capacity, int multiprocessors,
                                    int shared_limit) {
  AttentionPlan plan{};
  const int64_t query_rows = std::max<int64_t>(1, int64_t(tokens) * (q_heads / kv_heads));
  plan.head_dim = (std::max(k_dim, v_dim) + 63) / 64 * 64;
  const int most_rows = float32 ? 8 : max_rows(plan.head_dim);
  for (plan.rows = 8; plan.rows < most_rows && plan.rows < query_rows; plan.rows *= 2) {
  }
  while (choose_stages(plan.head_dim, plan.rows, float32, shared_limit, shared_limit + 1024) < 1) {
    if (plan.rows == 8) return plan;  // splits 0: head_dim 192 and 256 with 64 KB (sm_75)
    plan.rows /= 2;
  }
  plan.row_tiles = int((query_rows + plan.rows - 1) / plan.rows);
  const int64_t units = std::max<int64_t>(1, int64_t(batch) * kv_heads * plan.row_tiles);
  const int64_t slots = int64_t(multiprocessors) * min_blocks(plan.head_dim, plan.rows, float32);
  plan.splits = choose_splits(units, slots, capacity);
  plan.counters = units + 1;  // and one to draw from
  plan.partial_floats =
      plan.splits > 1 ? units * plan.splits * partial_floats(plan.head_dim, plan.rows) : 0;
  return plan;
}

}  // namespace kvquant::cuda
