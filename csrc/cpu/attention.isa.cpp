// Attention over the 8-bit cache: flash-decoding on the codes as they are stored.
//
//   score_t = scale_t * (q' . codes_t) + offset_t * sum(q') + q' . mean_group   q': rotated, scaled
//   out     = R^T (sum_t p_t * scale_t * codes_t + sum_t p_t * offset_t) / sum_t p_t
#include "cpu/attention.h"

#include "cpu/isa.h"
#include "cpu/tile.h"

namespace kvquant::cpu::KVQUANT_ISA {
namespace {

// From as many query rows on, converting a tile's codes once, into memory, is cheaper than once
// for every few rows in registers.
constexpr int kConvertRows = 3 * kQkRows;

// A thread's own memory, whatever the formats.
struct Workspace {
  Query query;
  Softmax split, total;
  alignas(64) float scores[kTileRows * kTileTokens];
  alignas(64) float k_scale[kTileTokens], k_middle[kTileTokens];
  alignas(64) float v_scale[kTileTokens], v_middle[kTileTokens];
  alignas(64) float decay[kTileRows];
  alignas(64) float converted[kTileTokens * kMaxDim];
  const float* converted_rows[kTileTokens];
};

template <class Rows>
FloatRows convert_tile(Workspace& w, const Rows& rows, int tokens, int dim) {
  for (int t = 0; t < tokens; ++t) {
    rows.ask_rows(t, 1, dim);
    float* const to = w.converted + t * dim;
    for (int c = 0; c < dim; c += kWidth) rows.load(t, c).store(to + c);
    w.converted_rows[t] = to;
  }
  return {w.converted_rows};
}

// Scores of one row from its dot products, in place; returns the largest that it sees. A score out
// of sight becomes -inf, whatever it was.
template <bool kPlain, class Tile>
KVQUANT_INLINE float score_row(const AttentionParams& p, const Workspace& w, const Tile& tile,
                               int r, int first, int at, float* scores) {
  const Vec sum = Vec::set(w.query.sum[r]), mean = Vec::set(w.query.mean[r]);
  const Vec begin = Vec::set(float(w.query.begin[r] - first));
  const Vec end = Vec::set(float(w.query.end[r] - first));
  const Vec cap = Vec::set(p.softcap), slope = Vec::set(w.query.slope[r]);
  const Vec distance = Vec::set(float(at - first));
  Vec top = Vec::set(-kInfinity);
  for (int t = 0; t < tile.count; t += kWidth) {
    const Vec index = Vec::load(tile.index + t);
    Vec s = fma(Vec::load(w.k_middle + t), sum, mean);
    s = fma(Vec::load(w.k_scale + t), Vec::load(scores + t), s);
    if constexpr (!kPlain) {
      if (p.softcap > 0.f) s = cap * tanh(s / cap);
      if (p.alibi_slopes) s = s - slope * abs(distance - index);
    }
    s = select(both(begin <= index, index < end), s, Vec::set(-kInfinity));
    s.store(scores + t);
    top = max(s, top);
  }
  return reduce_max(top);
}

// Weights of one row from its scores, in place.
template <class Tile>
KVQUANT_INLINE void weigh_row(Workspace& w, const Tile& tile, int r, int first, float top,
                              float decay, float* scores) {
  const Vec begin = Vec::set(float(w.query.begin[r] - first));
  const Vec end = Vec::set(float(w.query.end[r] - first));
  const Vec base = Vec::set(top == -kInfinity ? 0.f : top);
  Vec weight = zero(), shift = zero();
  for (int t = 0; t < tile.count; t += kWidth) {
    const Vec index = Vec::load(tile.index + t);
    const Mask seen = both(begin <= index, index < end);
    const Vec e = select(seen, exp(Vec::load(scores + t) - base), zero());
    weight = weight + e;
    shift = shift + select(seen, e * Vec::load(w.v_middle + t), zero());
    select(seen, e * Vec::load(w.v_scale + t), zero()).store(scores + t);
  }
  Softmax& split = w.split;
  split.weight[r] = split.weight[r] * decay + reduce_add(weight);
  split.shift[r] = split.shift[r] * decay + reduce_add(shift);
  split.top[r] = top;
}

// Adds a tile of tokens from `first` on to the split's softmax, and asks for the rows of the next.
template <class Formats, bool kYoung>
KVQUANT_INLINE void add_tile(const AttentionParams& p, const RowTile& rows, int first,
                             const TileRows<Formats, kYoung>& tile,
                             const TileRows<Formats, kYoung>* next, Workspace& w) {
  const int k_dim = p.cache.k.head_dim, v_dim = p.cache.v.head_dim, count = tile.count;
  tile.load_affine(w.k_scale, w.k_middle, w.v_scale, w.v_middle);
  if (next && next->count < count) next = nullptr;
  if (next) next->prefetch_params();
  const CodeRows<typename Formats::Key> keys{tile.k, next ? next->k : nullptr};
  const CodeRows<typename Formats::Value> values{tile.v, next ? next->v : nullptr};
  const auto score = [&](const auto& keys) {
    qk_tile(w.query.rows, k_dim, rows.count, keys, count, k_dim, w.scores, kTileTokens);
  };
  const auto add = [&](const auto& values) {
    pv_tile(w.scores, kTileTokens, rows.count, values, count, v_dim, w.decay, w.split.out, v_dim);
  };
  const bool convert = rows.count >= kConvertRows;
  if (convert) {
    score(convert_tile(w, keys, count, k_dim));
  } else {
    score(keys);
  }
  const bool plain = !(p.softcap > 0.f) && !p.alibi_slopes;
  for (int r = 0; r < rows.count; ++r) {
    float* const scores = w.scores + r * kTileTokens;
    const float best = plain ? score_row<true>(p, w, tile, r, first, rows.at(r), scores)
                             : score_row<false>(p, w, tile, r, first, rows.at(r), scores);
    const float before = w.split.top[r], top = most(before, best);
    w.decay[r] = top == before ? 1.f : expf(before - top);
    weigh_row(w, tile, r, first, top, w.decay[r], scores);
  }
  if (convert) {
    add(convert_tile(w, values, count, v_dim));
  } else {
    add(values);
  }
}

// A tile of either age.
template <class Formats>
struct AgedTile {
  TileRows<Formats> old;
  TileRows<FormatPair<Int8, Int8>, true> young;
  bool is_young = false;
};

// The softmax of the keys of one split, in w.split.
template <class Formats>
void add_split(Formats, const AttentionParams& p, const RowTile& rows, int split, Workspace& w) {
  const CacheView& cache = p.cache;
  const int length = split_tokens(rows.length);
  const int64_t from = int64_t(split) * length;
  const int begin = int(most<int64_t>(rows.begin, from));
  const int end = int(least<int64_t>(rows.end, from + length));
  const int step = cache.mean_group ? least(cache.mean_group, kTileTokens) : kTileTokens;
  w.split.clear(rows.count, cache.v.head_dim);
  if (begin >= end) return;
  const int group_size = age_group(cache, p.seqs);
  const Young young(cache, p.seqs, rows.sequence, rows.head,
                    read_from(group_size, rows.length, rows.call.count));
  AgedTile<Formats> tiles[2];  // the one at hand and the next
  const auto find = [&](AgedTile<Formats>& tile, int first) {
    const int limit = least(end - first, step) + first, count = round_up(limit - first, 16);
    tile.is_young = young.has(first);
    if (tile.is_young) {
      tile.young.find(cache, p.seqs, rows, young, first, count, begin, limit);
    } else {
      tile.old.find(cache, p.seqs, rows, young, first, count, begin, limit);
    }
  };
  int group = -1, at = 0;
  find(tiles[0], begin / step * step);
  for (int first = begin / step * step; first < end; at ^= 1) {
    if (cache.mean_group && first / cache.mean_group != group) {
      group = first / cache.mean_group;
      w.query.dot_mean(
          rows.count, cache.k.head_dim,
          mean_of<uint16_t>(cache, p.seqs, rows.paging, rows.sequence, rows.head, first));
    }
    const bool more = end - first > step;
    if (more) find(tiles[at ^ 1], first + step);
    const AgedTile<Formats>&tile = tiles[at], &next = tiles[at ^ 1];
    const bool alike = more && tile.is_young == next.is_young;
    if (tile.is_young) {
      add_tile(p, rows, first, tile.young, alike ? &next.young : nullptr, w);
    } else {
      add_tile(p, rows, first, tile.old, alike ? &next.old : nullptr, w);
    }
    if (!more) break;
    first += step;
  }
}

// out = R^T (out + shift) / weight, with the sink in the denominator.
void finish(const AttentionParams& p, const RowTile& rows, Workspace& w) {
  const int dim = p.cache.v.head_dim;
  for (int r = 0; r < rows.count; ++r) {
    const int head = rows.query_head(r), token = rows.token(r);
    float top = w.total.top[r], weight = w.total.weight[r], gain = 1.f;
    if (p.sinks) {
      const float sink = p.sinks[head], now = most(top, sink);
      const float base = now == -kInfinity ? 0.f : now;
      gain = expf(top - base);
      weight = weight * gain + expf(sink - base);
      top = now;
    }
    const Vec inverse = Vec::set(weight == 0.f ? 0.f : gain / weight);
    float* const out = w.total.out + r * dim;
    for (int c = 0; c < dim; c += kWidth) {
      ((Vec::load(out + c) + Vec::set(w.total.shift[r])) * inverse).store(out + c);
    }
    rotate(out, dim, p.cache.v.rotation);
    store_row(p.out.data,
              row_offset(p.out, p.seqs, rows.call, rows.sequence, token) + head * p.out.head_stride,
              p.dtype, dim, out);
    if (p.lse) {
      p.lse[(rows.call.first + token) * p.num_q_heads + head] =
          weight == 0.f ? -kInfinity : top + logf(weight);
    }
  }
}

// A tile of query rows: where its partial results lie and how many of them are there.
struct Splits {
  int first, count;  // splits that hold keys that the tile sees
};
Splits splits_of(const RowTile& rows) {
  if (rows.begin >= rows.end) return {0, 1};
  const int length = split_tokens(rows.length);
  return {rows.begin / length, (rows.end - 1) / length - rows.begin / length + 1};
}

template <class Formats>
Status attend(Formats formats, const AttentionParams& p, int threads) {
  const CacheView& cache = p.cache;
  const int gqa_group_size = p.num_q_heads / cache.num_kv_heads, batch = p.seqs.batch;
  const int64_t query_rows = int64_t(p.seqs.max_seqlen_q) * gqa_group_size;
  const int64_t row_tiles = ceil_div(query_rows, kTileRows);
  const int64_t tiles = batch * row_tiles * cache.num_kv_heads;
  if (tiles == 0) return Status::ok();
  const int tile_rows = int(least<int64_t>(kTileRows, query_rows));
  int longest = 1, longest_splits = 1;
  for (int b = 0; b < batch; ++b) {
    const int length = stored_tokens(cache, p.seqs, p.seqs.seq_lens[b]);
    longest = most(longest, length);
    if (length) longest_splits = most(longest_splits, int(ceil_div(length, split_tokens(length))));
  }
  const int splits = tiles * tile_rows > kMaxSplitRows ? 1 : longest_splits;
  const int64_t partial = Softmax::size(tile_rows, cache.v.head_dim);
  float* partials = nullptr;
  int* arrived = nullptr;
  if (splits > 1) {
    const size_t floats = size_t(tiles * splits * partial) * 4;
    char* const memory =
        static_cast<char*>(thread_scratch(Scratch::kCall, floats + size_t(tiles) * 4));
    if (!memory) return Status::device("attention: out of memory");
    partials = reinterpret_cast<float*>(memory);
    arrived = reinterpret_cast<int*>(memory + floats);
    memset(arrived, 0, size_t(tiles) * 4);
  }
  bool failed = false;
  const int64_t elements = tiles * longest * (cache.k.head_dim + cache.v.head_dim);
  parallel(worth(threads, elements), tiles * splits, [&](int64_t item) {
    const int64_t tile = item / splits;
    const int split = int(item % splits);
    const RowTile rows(p, int(tile / row_tiles / cache.num_kv_heads),
                       int(tile / row_tiles % cache.num_kv_heads), int(tile % row_tiles));
    const Splits mine = splits_of(rows);
    if (rows.count == 0 || (splits > 1 && split >= mine.count)) return;
    auto* const w = static_cast<Workspace*>(thread_scratch(Scratch::kWorker, sizeof(Workspace)));
    if (!w) return __atomic_store_n(&failed, true, __ATOMIC_RELAXED);
    w->query.load(p, rows);
    float* const saved = partials ? partials + tile * splits * partial : w->converted;
    if (splits > 1) {
      add_split(formats, p, rows, mine.first + split, *w);
      w->split.save(rows.count, cache.v.head_dim, saved + split * partial);
      // The last to arrive merges all, in their order.
      if (__atomic_add_fetch(&arrived[tile], 1, __ATOMIC_ACQ_REL) < mine.count) return;
    }
    w->total.clear(rows.count, cache.v.head_dim);
    for (int i = 0; i < mine.count; ++i) {
      if (splits == 1) {
        add_split(formats, p, rows, mine.first + i, *w);
        w->split.save(rows.count, cache.v.head_dim, saved);
      }
      w->total.merge(rows.count, cache.v.head_dim, splits == 1 ? saved : saved + i * partial);
    }
    finish(p, rows, *w);
  });
  if (partials) trim_scratch(Scratch::kCall);
  return failed ? Status::device("attention: out of memory") : Status::ok();
}

}  // namespace

Status attention(const AttentionParams& p, int threads) {
  return with_pair(p.cache.k.format, p.cache.v.format,
                   [&](auto formats) { return attend(formats, p, threads); });
}

}  // namespace kvquant::cpu::KVQUANT_ISA
