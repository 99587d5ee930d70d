// Shapes of the kernel for many query rows, as pure functions of numbers.
#pragma once

#include "kernels/attention/config.h"

namespace kvquant::cuda {

constexpr int kRowsTile = 64;      // tokens that a block takes at once
constexpr int kRowsBlocks = 3;     // of a multiprocessor
constexpr int kFewestRows = 32;    // query tokens x heads of a KV head that it is for

constexpr int kMostCluster = 8;    // blocks of a cluster, which have neighbouring splits

// Blocks of a cluster. With a split_size it must not depend on the capacity where a sequence has
// more splits than a cluster.
constexpr int cluster_of(int splits, int split_size) {
  if (splits <= kMostCluster || split_size > 0) return std::min(splits, kMostCluster);
  const int clusters = (splits + kMostCluster - 1) / kMostCluster;
  return (splits + clusters - 1) / clusters;
}

// A block has 32 rows, whose two bytes fill the tensor core's 64, or 64 rows in two passes.
inline AttentionShape shape_many_rows(int batch, int tokens, int q_heads, int kv_heads,
                                      int head_dim, int multiprocessors) {
  AttentionShape shape{};
  const int64_t query_rows = std::max<int64_t>(1, int64_t(tokens) * (q_heads / kv_heads));
  shape.head_dim = head_dim;
  shape.rows = query_rows <= 32 ? 32 : 64;
  shape.row_tiles = int((query_rows + shape.rows - 1) / shape.rows);
  shape.units = std::max<int64_t>(1, int64_t(batch) * kv_heads * shape.row_tiles);
  shape.instance = {1, kRowsTile / kTile, kRowsBlocks, 2};
  shape.slots = int64_t(multiprocessors) * kRowsBlocks;
  shape.fills = shape.row_tiles == 1 && shape.units >= shape.slots;
  return shape;
}

}  // namespace kvquant::cuda
