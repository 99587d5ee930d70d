// Shapes of the kernel for many query rows, as pure functions of numbers.
#pragma once

#include "kernels/attention/config.h"

namespace kvquant::cuda {

constexpr int kRowsTile = 64;  // tokens that a block takes at once
// Query rows of a KV head from which on it is worth it: the other kernel reads the tokens of 16 at
// the ceiling.
constexpr int kFewestRows = 17;

constexpr InstanceShape kRowsShape{1, 4, 3, 2};
static_assert(kRowsShape.step() == kRowsTile);

inline AttentionShape shape_many_rows(int batch, int tokens, int q_heads, int kv_heads,
                                      int head_dim, int multiprocessors) {
  AttentionShape shape{};
  const int64_t query_rows = std::max<int64_t>(1, int64_t(tokens) * (q_heads / kv_heads));
  shape.head_dim = head_dim;
  shape.rows = query_rows <= 32 ? 32 : 64;
  shape.row_tiles = int((query_rows + shape.rows - 1) / shape.rows);
  shape.units = std::max<int64_t>(1, int64_t(batch) * kv_heads * shape.row_tiles);
  shape.instance = kRowsShape;
  shape.slots = int64_t(multiprocessors) * shape.instance.blocks;
  shape.fills = shape.row_tiles == 1 && shape.units >= shape.slots;
  return shape;
}

}  // namespace kvquant::cuda
