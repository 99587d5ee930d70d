// Shapes of the kernel for many query rows, as pure functions of numbers.
#pragma once

#include <type_traits>

#include "formats/formats.h"
#include "kernels/attention/config.h"

namespace kvquant::cuda {

constexpr int kRowsTile = 64;  // tokens that a block takes at once
// Query rows of a KV head from which on it is worth it: the other kernel reads the tokens of 16 at
// the ceiling. By age that one has instances for 8 rows and for 32 alone; a decode step, whose
// append it takes along, is its own even so.
constexpr int fewest_rows(int tokens, bool by_age) { return by_age && tokens > 1 ? 9 : 17; }

// Whether a pair's rows have the params that it reads, and codes of up to a byte.
template <class Pair>
constexpr bool can_have_many_rows(Pair) {
  using Key = typename Pair::Key;
  using Value = typename Pair::Value;
  return std::is_same_v<typename Key::Params, AffineParams> &&
         std::is_same_v<typename Value::Params, AffineParams> && Key::code_bytes(16) <= 16 &&
         Value::code_bytes(16) <= 16;
}

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
