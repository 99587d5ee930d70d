// Attention over the 8-bit cache: flash-decoding on the codes as they are stored.
//
//   score_t = scale_t * (q' . codes_t) + offset_t * sum(q') + q' . mean_group   q': rotated, scaled
//   out     = R^T (sum_t p_t * scale_t * codes_t + sum_t p_t * offset_t) / sum_t p_t
#include "cpu/attention.h"

#include "cpu/isa.h"

namespace kvquant::cpu::KVQUANT_ISA {
namespace {

// A thread's own memory, whatever the formats.
struct Workspace {
  Query query;
  Softmax split, total;
  alignas(64) float scores[kTileRows * kTileTokens];
  alignas(64) float k_scale[kTileTokens], k_middle[kTileTokens];
  alignas(64) float v_scale[kTileTokens], v_middle[kTileTokens];
  alignas(64) float base[kTileRows], decay[kTileRows + kWidth];
  alignas(64) float lanes[2][kTileRows * kWidth];
  Products products;
  alignas(64) float saved[Softmax::size(kTileRows, kMaxDim)];  // a split's result, of one at a time
};

// Which tokens of a tile a query row sees.
struct SeenAll {
  static constexpr int count(int) { return kTileTokens; }
  KVQUANT_INLINE Vec only(Vec, Vec x, Vec) const { return x; }
};
struct SeenSome {
  Vec begin, end;
  static constexpr int count(int count) { return count; }
  KVQUANT_INLINE Vec only(Vec index, Vec x, Vec otherwise) const {
    return select(both(begin <= index, index < end), x, otherwise);
  }
};

// Scores of one row from its dot products, in place, and the largest that it sees, a lane each. A
// score out of sight becomes -inf, whatever it was.
template <bool kPlain, class Seen>
KVQUANT_INLINE Vec score_row(const AttentionParams& p, const Workspace& w, const float* indices,
                             int count, Seen seen, int r, int at, float* scores) {
  const Vec sum = Vec::set(w.query.sum[r]), mean = Vec::set(w.query.mean[r]);
  const Vec cap = Vec::set(p.softcap), slope = Vec::set(w.query.slope[r]);
  const Vec distance = Vec::set(float(at));
  Vec top = Vec::set(-kInfinity);
  for (int t = 0; t < seen.count(count); t += kWidth) {
    const Vec index = Vec::load(indices + t);
    Vec s = fma(Vec::load(w.k_middle + t), sum, mean);
    s = fma(Vec::load(w.k_scale + t), Vec::load(scores + t), s);
    if constexpr (!kPlain) {
      if (p.softcap > 0.f) s = cap * tanh(s / cap);
      if (p.alibi_slopes) s = s - slope * abs(distance - index);
    }
    s = seen.only(index, s, Vec::set(-kInfinity));
    s.store(scores + t);
    top = max(s, top);
  }
  return top;
}

// Weights of one row from its scores, in place, and what they add up to, a lane each.
template <class Seen>
KVQUANT_INLINE void weigh_row(Workspace& w, const float* indices, int count, Seen seen, int r,
                              float* scores) {
  const Vec base = Vec::set(w.base[r]);
  Vec weight = zero(), shift = zero();
  for (int t = 0; t < seen.count(count); t += kWidth) {
    const Vec index = Vec::load(indices + t);
    const Vec e = seen.only(index, exp(Vec::load(scores + t) - base), zero());
    weight = weight + e;
    shift = shift + seen.only(index, e * Vec::load(w.v_middle + t), zero());
    seen.only(index, e * Vec::load(w.v_scale + t), zero()).store(scores + t);
  }
  weight.store(w.lanes[0] + r * kWidth), shift.store(w.lanes[1] + r * kWidth);
}

// One float of each of four rows, in the first lanes, from a lane each.
template <class Op>
KVQUANT_INLINE Vec reduce_rows(const float* lanes, int first, const Op& op) {
  const float* const x = lanes + first * kWidth;
  return reduce4(Vec::load(x), Vec::load(x + kWidth), Vec::load(x + 2 * kWidth),
                 Vec::load(x + 3 * kWidth), op);
}

// A tile's dot products to weights, in place, and the running sums of these.
KVQUANT_INLINE void weigh_tile(const AttentionParams& p, const RowTile& rows, int first,
                               const float* indices, int count, bool holes, Workspace& w) {
  const auto each_row = [&](const auto& f) {
    for (int r = 0; r < rows.count; ++r) {
      const int begin = w.query.begin[r] - first, end = w.query.end[r] - first;
      if (count == kTileTokens && !holes && begin <= 0 && end >= count) {
        f(r, SeenAll{});
      } else {
        f(r, SeenSome{Vec::set(float(begin)), Vec::set(float(end))});
      }
    }
  };
  const bool plain = !(p.softcap > 0.f) && !p.alibi_slopes;
  each_row([&](int r, auto seen) {
    float* const scores = w.scores + r * kTileTokens;
    const int at = rows.at(r) - first;
    const Vec top = plain ? score_row<true>(p, w, indices, count, seen, r, at, scores)
                          : score_row<false>(p, w, indices, count, seen, r, at, scores);
    top.store(w.lanes[0] + r * kWidth);
  });
  Softmax& split = w.split;
  for (int r = 0; r < rows.count; r += 4) {
    const Vec best = reduce_rows(w.lanes[0], r, [](Vec a, Vec b) { return max(a, b); });
    const Vec before = Vec::load(split.top + r), top = max(best, before);
    const Vec base = select(Vec::set(-kInfinity) < top, top, zero());
    exp(before - base).store4(w.decay + r);
    base.store4(w.base + r), top.store4(split.top + r);
  }
  each_row(
      [&](int r, auto seen) { weigh_row(w, indices, count, seen, r, w.scores + r * kTileTokens); });
  const auto add = [](Vec a, Vec b) { return a + b; };
  for (int r = 0; r < rows.count; r += 4) {
    const Vec decay = Vec::load(w.decay + r);
    const Vec weight = reduce_rows(w.lanes[0], r, add), shift = reduce_rows(w.lanes[1], r, add);
    (Vec::load(split.weight + r) * decay + weight).store4(split.weight + r);
    (Vec::load(split.shift + r) * decay + shift).store4(split.shift + r);
  }
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
  w.products.score(keys, rows.count, count, k_dim, w.scores);
  weigh_tile(p, rows, first, tile.index, count, tile.holes, w);
  w.products.add(values, w.scores, rows.count, count, v_dim, w.decay, w.split.out);
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
    const auto set_query = [&](auto format) {
      w->products.set_query(format, p.dtype, cache.k.rotation > 1, w->query.rows, w->query.sum,
                            rows.count, cache.k.head_dim);
    };
    set_query(typename decltype(formats)::Key{});
    if (p.seqs.young.data) set_query(Int8{});
    float* const saved = partials ? partials + tile * splits * partial : w->saved;
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
