// The contract between bindings and kernels: plain structs of pointers, sizes and strides, the same
// for every backend. The bindings' callers have checked shapes and dtypes; kernels trust them, but
// never the *contents* of tensors: block ids, slots and lengths may hold anything and must not lead
// out of bounds.
//
// The formula (x: a key or value row, R: block-diagonal orthonormal Hadamard rotation, or
// identity; codes q and their scale and offset: of the row's format):
//
//   x^[b,h,t] = R^T (scale[b,h,t] * q[b,h,t] + offset[b,h,t] + mean[b,h,t / mean_group])
#pragma once

#include <cstdint>

namespace kvquant {

enum class Dtype : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

enum class RowFormat : int32_t { kInt8 = 0, kInt4 = 1 };  // one a type of formats/formats.h

// The rows of one (block, head) are contiguous and 16-byte aligned; blocks and heads may lie
// anywhere (strides in bytes), so a foreign buffer can be served as it is.
struct Slab {
  uint8_t* data;
  int64_t block_stride, head_stride;  // bytes
};
// One layer's keys, or its values. What the bytes mean, their format alone knows.
struct RowsView {
  Slab codes, params;  // [num_blocks, num_kv_heads, block_size, bytes of a row]
  int32_t head_dim;    // a multiple of 16, at most 256
  int32_t rotation;    // length of the Hadamard blocks; 1: identity
  RowFormat format;
};
struct CacheView {
  RowsView k, v;
  // float16 [num_blocks, num_kv_heads, ceil(block_size / mean_group), k.head_dim]; null: no mean
  Slab mean;
  int32_t num_blocks, num_kv_heads;
  int32_t block_size;  // any length if a sequence has one block, else a power of two
  int32_t mean_group;  // tokens that share a key mean: a power of two; 0: no mean
};

// Which tokens: sequence b's token t is row t % block_size of block table[b, t / block_size].
struct Sequences {
  const int32_t* block_table;  // [batch, max_blocks]
  int64_t block_table_stride;  // elements between sequences
  int32_t batch, max_blocks;
  const int32_t* seq_lens;      // [batch] tokens stored (append: before the call)
  const int32_t* seq_starts;    // [batch] tokens before it are padding; null: 0
  const int32_t* cu_seqlens_q;  // [batch + 1] the call's rows when packed; null: dense
  int32_t total_q;              // packed: rows there are; cu_seqlens_q beyond them are cut
  int32_t max_seqlen_q;         // the call's rows a sequence; packed: a bound on them
  // [batch, num_kv_heads] slabs of 8-bit rows of the youngest tokens, see common/age.h; null: none
  Slab young;
};

// Rows of the caller: [batch, tokens, heads, dim] when dense, [total, heads, dim] when packed
// (batch_stride unused). The last dimension is contiguous. Strides in elements.
struct Rows {
  void* data;
  int64_t batch_stride, token_stride, head_stride;
};

// Rotates, subtracts the group's mean (computing it where a group begins), quantizes, scatters.
// A group's mean is that of the rows of the group before: incoming rows where they come in this
// call, stored ones otherwise. Without such rows (the first group): of its own incoming rows if
// there are at least 16, else zero. Padding, skipped and non-finite rows do not count.
struct AppendParams {
  CacheView cache;
  Sequences seqs;
  Rows key, value;
  Dtype dtype;
  const int64_t* slot_mapping;  // [rows] block * block_size + row, -1: skip; null: by block table.
                                // With one, block_table and seq_lens may be null if mean_group == 0
  int32_t* advance;             // seq_lens, writable: the call adds its tokens to them; null: no
  int32_t* counter;             // CUDA with advance: one zero, left zero
  // CUDA: append_floats of common/groups.h, bytes of 255, left so; null: there is no room
  float* partial;
};

// CUDA: which kernel a call is planned for, a row of kernels/attention/regimes.h.
enum class AttentionKernel : int32_t { kSplitKv = 0, kManyRows = 1 };

// Query token i of n stands at position seq_len - n + i. Packed rows and dense rows as above.
struct AttentionParams {
  CacheView cache;
  Sequences seqs;   // seq_lens with the queries' own tokens
  Rows query, out;  // [.., num_q_heads, k.head_dim] and [.., num_q_heads, v.head_dim]
  Dtype dtype;      // of both
  float* lse;       // like query without dim, contiguous, natural logarithm; null: not wanted
  int32_t num_q_heads;
  float softmax_scale;
  bool causal;
  int32_t sliding_window;     // key j is seen from position i if j > i - sliding_window; 0: all
  float softcap;              // score = softcap * tanh(score / softcap); 0: none
  const float* sinks;         // [num_q_heads] logits of a key with no value; null: none
  const float* alibi_slopes;  // [num_q_heads] score -= slope * |i - j|; null: none
  // CUDA: room for the splits' partial results, see kernels/attention/config.h; bytes of 255, left
  // so
  float* partial;
  int32_t* counters;  // zeros, left zero: one a sequence
  AttentionKernel kernel;
  int32_t splits;      // most splits of a sequence
  int32_t split_size;  // tokens of every split, whatever the call's sizes; 0: as these ask for
};

// Dequantizes tokens 0 .. tokens-1 of every sequence; those outside [seq_start, seq_len) are zero.
struct GatherParams {
  CacheView cache;
  Sequences seqs;   // max_seqlen_q: rows of the output a sequence
  Rows key, value;  // out, [batch, max_seqlen_q, num_kv_heads, dim]
  Dtype dtype;
};

// CUDA: attention of long chunks by dense kernels, on pieces of the history. Dequantizes the tokens
// [first, first + tokens) of each sequence into contiguous rows; those of [low, high) are stored. A
// token that is not finite, not stored, or has no place, becomes a NaN key and a zero value: dense
// attention is NaN then for whoever sees it, and for no one else.
struct Piece {
  void *key, *value;  // out, [batch, num_kv_heads, tokens, dim]
  int32_t first, tokens, low, high;
  bool backwards;  // row i is token first + tokens - 1 - i
};
constexpr int kMostPieces = 4;
struct PieceParams {
  CacheView cache;
  Sequences seqs;  // block_table, batch, max_blocks and young
  Piece pieces[kMostPieces];
  int32_t count;
  int32_t young_from;  // by age: tokens from this one on are young, and those of the first group
  Dtype dtype;         // fp16 or bf16
};

// Merges attention over several sets of tokens to that over all of them, by their log-sum-exps.
struct MergeSource {
  Rows out;                 // of the call's dtype, or float32
  Rows lse;                 // float32, like out without dim
  bool float32, backwards;  // backwards: row i is the call's row tokens - 1 - i
};
constexpr int kMostMerged = 6;
struct MergeParams {
  MergeSource sources[kMostMerged];
  int32_t count, batch, tokens, heads, dim;
  Dtype dtype;
  Rows out;            // of dtype; all strides in elements
  Rows lse;            // float32; null: not wanted
  const float* sinks;  // [heads] logits with no value; null: none
  bool float32;        // out is float32 whatever dtype says
};

// Plain (q, scale, zero) tensors: x^ = scale * (q - zero).
enum class Granularity : int32_t { kToken = 0, kHead = 1, kChannel = 2 };

struct Affine {
  const float *scale, *zero;
  // Element strides; 0 where a pair is shared. Row s uses index s / group along the third.
  int64_t batch_stride, head_stride, group_stride, channel_stride;
  int32_t group;
};

struct QuantizeParams {
  const void* x;  // [batch, heads, tokens, dim], last contiguous
  int64_t batch_stride, head_stride, token_stride;
  int32_t batch, heads, tokens, dim;
  Dtype dtype;
  uint8_t* q;  // [batch, heads, tokens, dim] contiguous
  float *scale,
      *zero;  // token: [b, h, s, 1]; head: [b, h, 1, 1]; channel: [b, h, ceil(s/group), d]
  Granularity granularity;
  int32_t group;  // channel: tokens that share a pair
  float qmin, qmax;
};

struct DequantizeParams {
  const uint8_t* q;  // [batch, heads, tokens, dim], last contiguous
  int64_t batch_stride, head_stride, token_stride;
  int32_t batch, heads, tokens, dim;
  Affine affine;
  void* out;  // contiguous
  Dtype dtype;
};

// qk: out[b,h,i,j] = sum_c x[b,h,i,c] * x^[b,h/g,j,c]     x: [b, heads, rows, dim],    out: [..,
// tokens] pv: out[b,h,i,c] = sum_j x[b,h,i,j] * x^[b,h/g,j,c]     x: [b, heads, rows, tokens], out:
// [.., dim]
struct MatmulParams {
  const void* x;
  int64_t x_batch_stride, x_head_stride, x_row_stride;
  const uint8_t* q;  // [batch, kv_heads, tokens, dim], last contiguous
  int64_t batch_stride, head_stride, token_stride;
  Affine affine;
  void* out;  // contiguous
  Dtype dtype;
  int32_t batch, heads, kv_heads, rows, tokens, dim;
};

}  // namespace kvquant
