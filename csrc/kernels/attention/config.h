// Shapes of the attention kernel and how a call is cut into blocks: pure functions of numbers.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace kvquant::cuda {

constexpr int kTile = 16;        // tokens of a tensor core's step
constexpr int kMinSplit = 256;   // tokens; shorter splits cost more than they gain
constexpr int kMaxSplits = 256;  // of a sequence
// Tokens of a split of 8-bit rows where there is work enough and sequences may be longer than
// kUneven: evens out unequal ones (64 of 1 to 16384 tokens on an H200: 82% of the read ceiling with
// splits of 4096, sequence by sequence, 85% with the short last splits behind all others, 88% so).
// Splits of smaller rows are longer: a block's other work takes the time of more of them (k4v4, 64
// of 32768: 78% with splits of 3072, 81% of 6144; 64 of 1 to 32768: 75% and 77%).
constexpr int kMaxSplit = 3072, kUneven = 8192;
constexpr int kMaxStages = 2;    // of a warp's ring
constexpr int kBlockCost = 256;  // tokens' worth of a block's other work
// Tokens of a multiprocessor up to which one block serves it best, and the same where twice as many
// blocks would mean many splits to combine.
constexpr int kMostOnOneBlock = 1024, kMostOnOneBlockInSplits = 2560;
constexpr int kManySplits = 8;
// Four blocks of four warps begin and end at more times than two of eight (256 sequences of 1024
// tokens on an H200: 88% of the read ceiling instead of 85.5%). Channels of a unit up to which that
// is worth more blocks' prologues.
constexpr int kMostInSmallBlocks = 1 << 18;

// How many blocks a multiprocessor runs at once.
enum class Occupancy { kUsual, kOneBlock, kManyBlocks };

// What an instance is made of, chosen by the registers that it needs for accumulators and for the
// tokens on their way.
struct InstanceShape {
  int tiles;          // of kTile tokens, that a warp takes at once
  int warps, blocks;  // of a block; of a multiprocessor
  int stages;         // at most, of a warp's ring of tokens on their way; 0: registers hold them

  constexpr int threads() const { return warps * 32; }
  constexpr bool has_room() const { return threads() * blocks <= 256; }  // of registers
  constexpr int step() const { return warps * tiles * kTile; }  // tokens a block takes at once
  constexpr bool operator==(const InstanceShape& other) const {
    return tiles == other.tiles && warps == other.warps && blocks == other.blocks &&
           stages == other.stages;
  }
};

// rows: query rows of a block, 8, 16 or 32. float32 weights are taken twice, as fp16 and what fp16
// left of them.
constexpr InstanceShape instance_shape(int head_dim, int rows, bool float32, Occupancy occupancy) {
  const bool few_registers = rows == 8 && !float32;  // for accumulators
  if (few_registers && head_dim <= 128) {
    const int tiles = head_dim <= 64 ? 2 : 1;  // with two, small blocks gain nothing
    if (occupancy == Occupancy::kManyBlocks && tiles == 1) return {tiles, 4, 4, 0};
    return {tiles, 8, occupancy == Occupancy::kOneBlock ? 1 : 2, 0};
  }
  if (head_dim > 128) return {1, 4, 2, few_registers ? 0 : kMaxStages};
  if (head_dim == 128 && rows == 32) return {1, 4, 2, kMaxStages};
  return {1, 8, 1, kMaxStages};
}

// Query rows a block takes at most. 32 rows of more channels exceed the registers.
constexpr int max_rows(int head_dim) { return head_dim <= 128 ? 32 : 16; }

// What a call's sizes make of it.
struct AttentionShape {
  int head_dim;   // of the instance: a multiple of 64 that covers both head_dims
  int rows;       // of a block
  int row_tiles;  // of a sequence and KV head
  InstanceShape instance;
  int64_t units;  // of (sequence, KV head, row tile)
  // One block: all run at once, and less is on its way than where two share a multiprocessor, which
  // is shared out more evenly among multiprocessors. Many: units are many and short.
  Occupancy occupancy;
  int64_t slots;  // blocks that the device runs at once
  // Units of one row tile alone fill the device: splits then are as long for every sequence.
  bool fills;
};

struct AttentionPlan {
  int splits;  // most blocks along the tokens
  int64_t partial_floats, counters;
};

// Floats that a block leaves to be combined: its rows' accumulators, maxima and sums.
constexpr int partial_floats(int head_dim, int rows) { return rows * (head_dim + 2); }

// Tokens of a split, if `span` tokens are cut into `splits` pieces of whole steps.
constexpr int split_length(int span, int splits, int step) {
  return ((span + splits - 1) / splits + step - 1) / step * step;
}

// The splits that finish soonest: waves of blocks, each as long as its tokens and what a block
// costs besides (prologue and combining).
// code_bits: of a channel's codes, of key and value together.
inline int choose_splits(const AttentionShape& shape, int capacity, int code_bits) {
  const int most = int(std::min<int64_t>(
      {kMaxSplits, (capacity + kMinSplit - 1) / kMinSplit, 8 * shape.slots / shape.units + 1}));
  const bool uneven = shape.fills && capacity > kUneven;
  int best = uneven ? std::clamp(capacity / (kMaxSplit * 16 / code_bits), 1, kMaxSplits) : 1;
  double best_cost = 1e30;
  for (int splits = best; splits <= most; ++splits) {
    const int length = split_length(capacity, splits, shape.instance.step());
    const double waves =
        double(shape.units) * ((capacity + length - 1) / length) / double(shape.slots);
    const double rounds = waves <= 4 ? std::ceil(waves) : waves + 0.5;  // later they drift apart
    const double cost = rounds * (length + kBlockCost);
    if (cost < best_cost) best_cost = cost, best = splits;
  }
  return best;
}

// by_age: such instances are fewer (launch.cuh).
// capacity: most tokens of a sequence. With a split_size an instance's warps must not depend on the
// batch: they decide in which order a split is summed.
inline AttentionShape shape_attention(int batch, int tokens, int q_heads, int kv_heads, int k_dim,
                                      int v_dim, bool by_age, bool float32, int capacity,
                                      int split_size, int multiprocessors) {
  AttentionShape shape{};
  const int64_t query_rows = std::max<int64_t>(1, int64_t(tokens) * (q_heads / kv_heads));
  shape.head_dim = (std::max(k_dim, v_dim) + 63) / 64 * 64;
  const int most_rows = float32 ? 8 : max_rows(shape.head_dim);
  for (shape.rows = 8; shape.rows < most_rows && shape.rows < query_rows; shape.rows *= 2) {
  }
  if (by_age && shape.rows > 8) shape.rows = most_rows;
  shape.row_tiles = int((query_rows + shape.rows - 1) / shape.rows);
  shape.units = std::max<int64_t>(1, int64_t(batch) * kv_heads * shape.row_tiles);
  const bool one_tile = shape.row_tiles == 1;
  const bool many_splits = shape.units * kManySplits <= multiprocessors;
  const int64_t most = many_splits ? kMostOnOneBlockInSplits : kMostOnOneBlock;
  const auto usual = instance_shape(shape.head_dim, shape.rows, float32, Occupancy::kUsual);
  if (one_tile && shape.units <= multiprocessors &&
      shape.units * capacity <= multiprocessors * most) {
    shape.occupancy = Occupancy::kOneBlock;
  } else if (one_tile && split_size == 0 &&
             shape.units >= int64_t(multiprocessors) * usual.blocks &&
             int64_t(capacity) * shape.head_dim <= kMostInSmallBlocks) {
    shape.occupancy = Occupancy::kManyBlocks;
  }
  shape.instance = instance_shape(shape.head_dim, shape.rows, float32, shape.occupancy);
  shape.slots = int64_t(multiprocessors) * shape.instance.blocks;
  shape.fills = one_tile && shape.units >= int64_t(multiprocessors) * usual.blocks;
  return shape;
}

// capacity, split_size: tokens; split_size 0: as suits the sizes.
inline AttentionPlan plan_attention(const AttentionShape& shape, int batch, int capacity,
                                    int code_bits, int split_size = 0) {
  AttentionPlan plan{};
  plan.splits = split_size > 0 ? std::max(1, (capacity + split_size - 1) / split_size)
                               : choose_splits(shape, capacity, code_bits);
  plan.counters = std::max(1, batch);
  plan.partial_floats =
      plan.splits > 1 ? shape.units * plan.splits * partial_floats(shape.head_dim, shape.rows) : 0;
  return plan;
}

}  // namespace kvquant::cuda
