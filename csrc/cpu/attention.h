// How an attention call is cut into work, and the running softmax: used by attention.isa.cpp.
//
// The query rows of a sequence and KV head (its query heads times the call's tokens) are cut into
// tiles of kTileRows, the keys into splits at fixed tokens. A split's length follows from the
// sequence's length alone and splits are merged in their order, so a result depends neither on the
// number of threads nor on the rest of the batch.
#pragma once

#include <cmath>

#include "common/mask.h"
#include "cpu/products.h"
#include "cpu/rows.h"

namespace kvquant::cpu::KVQUANT_ISA {

constexpr int kSplitTokens = 1024, kMaxSplits = 64;
// More query rows than this keep all threads busy without splits in parallel, and the memory for
// their partial results would be large: then one item of work goes through all splits.
constexpr int64_t kMaxSplitRows = 2048;

KVQUANT_INLINE int split_tokens(int length) {
  return int(ceil_div(length, int64_t(kSplitTokens) * kMaxSplits)) * kSplitTokens;
}

// One tile of query rows. Row r is query head r % gqa_group_size of token r / gqa_group_size of the
// call.
struct RowTile {
  int sequence, head, gqa_group_size;
  CallRows call;
  Paging paging;
  int first, count;   // query rows
  int start, length;  // the sequence's keys
  int position;       // of the call's token 0
  int begin, end;     // keys that any of the rows sees; none: begin == end

  KVQUANT_INLINE RowTile(const AttentionParams& p, int sequence, int head, int tile)
      : sequence(sequence),
        head(head),
        gqa_group_size(p.num_q_heads / p.cache.num_kv_heads),
        call(call_rows(p.seqs, sequence)),
        paging(p.cache, p.seqs.max_blocks),
        first(tile * kTileRows),
        count(int(most<int64_t>(
            0, least<int64_t>(kTileRows, int64_t(call.count) * gqa_group_size - first)))),
        start(first_token(p.seqs, sequence)),
        length(stored_tokens(p.cache, p.seqs, p.seqs.seq_lens[sequence])),
        position(length - call.count),
        begin(0),
        end(0) {
    if (count == 0) return;
    begin = seen_begin(p, 0);
    end = most(begin, seen_end(p, count - 1));
  }
  KVQUANT_INLINE int token(int r) const { return (first + r) / gqa_group_size; }
  KVQUANT_INLINE int query_head(int r) const {
    return head * gqa_group_size + (first + r) % gqa_group_size;
  }
  KVQUANT_INLINE int at(int r) const { return position + token(r); }
  KVQUANT_INLINE int seen_begin(const AttentionParams& p, int r) const {
    return least(length, first_seen(p.sliding_window, start, at(r)));
  }
  KVQUANT_INLINE int seen_end(const AttentionParams& p, int r) const {
    return kvquant::seen_end(p.causal, length, at(r));
  }
};

// Running softmax of a tile's rows: sum p x^ = out + shift over weight = sum p, where
// p = e^(score - top).
struct Softmax {
  alignas(64) float out[kTileRows * kMaxDim];  // [rows, v_dim]
  // Of [rows]; vectors of four rows reach beyond.
  alignas(64) float top[kTileRows + kWidth], weight[kTileRows + kWidth], shift[kTileRows + kWidth];

  KVQUANT_INLINE void clear(int rows, int dim) {
    for (int i = 0; i < rows * dim; i += kWidth) zero().store(out + i);
    for (int r = 0; r < rows; ++r) top[r] = -kInfinity, weight[r] = shift[r] = 0.f;
  }
  // Floats of a partial result.
  static KVQUANT_INLINE constexpr int64_t size(int rows, int dim) {
    return int64_t(rows) * (dim + 3);
  }
  KVQUANT_INLINE void save(int rows, int dim, float* to) const {
    memcpy(to, out, size_t(rows) * dim * 4);
    to += rows * dim;
    memcpy(to, top, size_t(rows) * 4);
    memcpy(to + rows, weight, size_t(rows) * 4);
    memcpy(to + 2 * rows, shift, size_t(rows) * 4);
  }
  KVQUANT_INLINE void merge(int rows, int dim, const float* from) {
    const float* const tops = from + rows * dim;
    for (int r = 0; r < rows; ++r) {
      const float now = most(top[r], tops[r]), base = now == -kInfinity ? 0.f : now;
      const float mine = expf(top[r] - base), its = expf(tops[r] - base);
      for (int c = 0; c < dim; c += kWidth) {
        float* const to = out + r * dim + c;
        fma(Vec::load(from + r * dim + c), Vec::set(its), Vec::load(to) * Vec::set(mine)).store(to);
      }
      weight[r] = weight[r] * mine + tops[rows + r] * its;
      shift[r] = shift[r] * mine + tops[2 * rows + r] * its;
      top[r] = now;
    }
  }
};

// Query rows as floats, rotated and scaled, and what of a score does not depend on the key.
struct Query {
  alignas(64) float rows[kTileRows * kMaxDim];  // [rows, k_dim]
  alignas(64) float mean[kTileRows];            // row . mean of the group
  float sum[kTileRows];                         // of the row
  float slope[kTileRows];
  int begin[kTileRows], end[kTileRows];  // keys that the row sees

  KVQUANT_INLINE void load(const AttentionParams& p, const RowTile& tile) {
    const int dim = p.cache.k.head_dim;
    for (int r = 0; r < tile.count; ++r) {
      float* const x = rows + r * dim;
      load_row(p.query.data,
               row_offset(p.query, p.seqs, tile.call, tile.sequence, tile.token(r)) +
                   tile.query_head(r) * p.query.head_stride,
               p.dtype, dim, x);
      rotate(x, dim, p.cache.k.rotation);
      Vec total = zero();
      for (int c = 0; c < dim; c += kWidth) {
        const Vec scaled = Vec::load(x + c) * Vec::set(p.softmax_scale);
        scaled.store(x + c);
        total = total + scaled;
      }
      sum[r] = reduce_add(total);
      mean[r] = 0.f;
      slope[r] = p.alibi_slopes ? p.alibi_slopes[tile.query_head(r)] : 0.f;
      begin[r] = tile.seen_begin(p, r), end[r] = tile.seen_end(p, r);
    }
  }
  KVQUANT_INLINE void dot_mean(int count, int dim, const uint16_t* means) {
    for (int r = 0; r < count; ++r) {
      Vec total = zero();
      for (int c = 0; means && c < dim; c += kWidth) {
        total = fma(Vec::load(rows + r * dim + c), Vec::load_half(means + c), total);
      }
      mean[r] = reduce_add(total);
    }
  }
};

// The rows of a tile of keys and values, wherever they lie. A tile is of one group of tokens, hence
// young or old as a whole.
template <class Formats, bool kYoung = false>
struct TileRows {
  using Key = typename Formats::Key;
  using Value = typename Formats::Value;
  // Neighbouring tokens of one block.
  struct Run {
    int first, count;
    const typename Key::Params* k_params;  // null: no such rows
    const typename Value::Params* v_params;
  };

  const uint8_t *k[kTileTokens], *v[kTileTokens];
  // Index within the tile; far below where there is no row, so that no query row sees it.
  alignas(64) float index[kTileTokens];
  Run runs[kTileTokens];
  int run_count, count;
  bool holes;  // tokens without a row

  // Tokens [first, first + tokens), a multiple of 16, of which [begin, end) may be read.
  KVQUANT_INLINE void find(const CacheView& cache, const Sequences& seqs, const RowTile& tile,
                           const Young& young, int first, int tokens, int begin, int end) {
    alignas(64) static constexpr uint8_t kNoRow[kMaxDim] = {};
    const int k_bytes = Key::code_bytes(cache.k.head_dim);
    const int v_bytes = Value::code_bytes(cache.v.head_dim);
    run_count = 0, count = tokens, holes = false;
    for (int t = 0, run; t < tokens; t += run) {
      const int token = first + t;
      Place at{-1, 0};
      if (token < begin) {
        run = least(begin - token, tokens - t);
      } else if (token >= end) {
        run = tokens - t;
      } else {
        at = place_of(cache, seqs, tile.paging, tile.sequence, token);
        run = least(least(end - token, tokens - t), cache.block_size - at.row);
      }
      const bool some = at.block >= 0;
      holes = holes || !some;
      const uint8_t *k_row = kNoRow, *v_row = kNoRow;
      Run& to = runs[run_count++];
      to = {t, run, nullptr, nullptr};
      if constexpr (kYoung) {
        if (some) {
          const int row = young.row(token);
          run = least(run, young.run(token)), to.count = run;
          k_row = young.codes(true, row), v_row = young.codes(false, row);
          to.k_params = &young_params(young, true, row);
          to.v_params = &young_params(young, false, row);
        }
      } else if (some) {
        k_row = rows_of<uint8_t>(cache.k.codes, at.block, tile.head) + int64_t(at.row) * k_bytes;
        v_row = rows_of<uint8_t>(cache.v.codes, at.block, tile.head) + int64_t(at.row) * v_bytes;
        to.k_params = rows_of<typename Key::Params>(cache.k.params, at.block, tile.head) + at.row;
        to.v_params = rows_of<typename Value::Params>(cache.v.params, at.block, tile.head) + at.row;
      }
      const int k_step = some ? k_bytes : 0, v_step = some ? v_bytes : 0;
      for (int i = 0; i < run; ++i) {
        k[t + i] = k_row + i * k_step;
        v[t + i] = v_row + i * v_step;
        index[t + i] = some ? float(t + i) : -1e9f;
      }
    }
  }

  KVQUANT_INLINE void prefetch_params() const {
    for (int i = 0; i < run_count; ++i) {
      __builtin_prefetch(runs[i].k_params);
      __builtin_prefetch(runs[i].v_params);
    }
  }

  // Scale and middle of the tile's tokens, x = scale * (code - kMiddleCode) + middle; zero where
  // there is no row.
  KVQUANT_INLINE void load_affine(float* k_scale, float* k_middle, float* v_scale,
                                  float* v_middle) const {
    load_affine(Key{}, &Run::k_params, k_scale, k_middle);
    load_affine(Value{}, &Run::v_params, v_scale, v_middle);
  }

 private:
  template <class Format>
  KVQUANT_INLINE void load_affine(Format, const typename Format::Params* Run::* of, float* scales,
                                  float* middles) const {
    alignas(64) typename Format::Params params[kTileTokens];
    for (int i = 0; i < run_count; ++i) {
      const Run& run = runs[i];
      const size_t bytes = size_t(run.count) * sizeof(params[0]);
      if (run.*of) {
        memcpy(params + run.first, run.*of, bytes);
      } else {
        memset(params + run.first, 0, bytes);
      }
    }
    for (int t = 0; t < count; t += kWidth) {
      Vec scale, middle;
      Codes<Format>::load_affine(params + t, scale, middle);
      scale.store(scales + t), middle.store(middles + t);
    }
  }
};

}  // namespace kvquant::cpu::KVQUANT_ISA
