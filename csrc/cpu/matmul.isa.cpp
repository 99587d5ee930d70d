// The unfused attention matmuls on plain (q, scale, zero) tensors of any granularity.
//
// Pairs are folded into x and into the sums, so that the inner loops see integers:
//   qk, a pair a token:    scale_j * (x . q_j - zero_j * sum(x))
//   qk, a pair a channel:  (x * scale) . q_j - (x * scale) . zero
//   pv, a pair a token:    sum_j (x_j * scale_j) q_j - sum_j x_j scale_j zero_j
//   pv, a pair a channel:  scale * (sum_j x_j q_j - zero * sum_j x_j), a group of tokens at a time
// The query rows of all heads of a KV head are one tile's rows: its codes are read once for them.
#include "cpu/isa.h"
#include "cpu/rows.h"
#include "cpu/tile.h"

namespace kvquant::cpu::KVQUANT_ISA {
namespace {

constexpr int kTileRows = 32, kTileTokens = 64;
constexpr int kPiece = 256;        // channels at a time
constexpr int kItemTokens = 1024;  // qk: tokens of an item of work

// Some query rows of a KV head, and its codes.
struct Item {
  const MatmulParams& p;
  int64_t batch, head;  // KV head
  int share, first, rows;
  const uint8_t* q;
  int64_t pairs;  // index of the first pair

  Item(const MatmulParams& p, int64_t kv_head, int tile)
      : p(p),
        batch(kv_head / p.kv_heads),
        head(kv_head % p.kv_heads),
        share(p.heads / p.kv_heads),
        first(tile * kTileRows),
        rows(least(kTileRows, share * p.rows - first)),
        q(p.q + batch * p.batch_stride + head * p.head_stride),
        pairs(batch * p.affine.batch_stride + head * p.affine.head_stride) {}

  // Columns [c, c + count) of x's row r, and zeros up to a multiple of 16.
  void load(int r, int c, int count, float* to) const {
    for (int i = count / 16 * 16; i < count; ++i) to[i] = 0.f;
    for (int i = count; i % 16; ++i) to[i] = 0.f;
    const int64_t h = head * share + (first + r) / p.rows, row = (first + r) % p.rows;
    load_row(p.x, batch * p.x_batch_stride + h * p.x_head_stride + row * p.x_row_stride + c,
             p.dtype, count, to);
  }
  // Index of out's row r.
  int64_t out_row(int r) const { return (batch * p.heads + head * share) * p.rows + first + r; }
  int64_t pair_of(int token) const {
    return pairs + token / p.affine.group * p.affine.group_stride;
  }
  // Where the run of tokens from `token` that has one pair a channel ends.
  int run_end(int token, int end) const {
    if (p.affine.channel_stride == 0 || p.affine.group_stride == 0) return end;
    return int(least<int64_t>(end, (int64_t(token) / p.affine.group + 1) * p.affine.group));
  }
};

// Rows of codes of a tile: as they lie, or copied where a vector would reach beyond a row.
struct Codes {
  const uint8_t* rows[kTileTokens];
  alignas(64) uint8_t copy[kTileTokens * kPiece];

  // Channels [c, c + count) of `tokens` rows, up to a multiple of kQkTokens.
  void find(const Item& item, int token, int tokens, int c, int count) {
    alignas(64) static constexpr uint8_t kNoRow[kPiece] = {};
    for (int t = 0; t < tokens; ++t) {
      rows[t] = item.q + (token + t) * item.p.token_stride + c;
      if (count % 16 == 0) continue;
      uint8_t* const to = copy + t * kPiece;
      memset(to, 0, kPiece);
      memcpy(to, rows[t], size_t(count));
      rows[t] = to;
    }
    for (int t = tokens; t % kQkTokens; ++t) rows[t] = kNoRow;
  }
};

struct Workspace {
  Codes codes;
  alignas(64) float x[kTileRows * kPiece];    // a piece of the query rows, or their weights
  alignas(64) float sum[kTileRows * kPiece];  // pv: of a run of tokens; qk: of a piece
  alignas(64) float out[kTileRows * kPiece];
  alignas(64) float scale[kPiece], zero_point[kPiece];
  alignas(64) float unit[kTileRows], constant[kTileRows];
};

void load_channel_pairs(const Item& item, int token, int c, int count, Workspace& w) {
  const Affine& a = item.p.affine;
  for (int i = 0; i < round_up(count, 16); ++i) {
    const int64_t at = item.pair_of(token) + (i < count ? (c + i) * a.channel_stride : 0);
    w.scale[i] = a.scale[at], w.zero_point[i] = a.zero[at];
  }
}

// Scores of a run of at most kTileTokens tokens, all with the same pairs if they are a channel's.
void qk_run(const Item& item, int token, int tokens, Workspace& w) {
  const MatmulParams& p = item.p;
  const Affine& a = p.affine;
  for (int c = 0; c < p.dim; c += kPiece) {
    const int count = least(kPiece, p.dim - c), width = round_up(count, 16);
    if (a.channel_stride) load_channel_pairs(item, token, c, count, w);
    for (int r = 0; r < item.rows; ++r) {
      float* const x = w.x + r * width;
      item.load(r, c, count, x);
      Vec constant = zero();
      for (int i = 0; i < width; i += kWidth) {
        Vec y = Vec::load(x + i);
        if (a.channel_stride) {
          y = y * Vec::load(w.scale + i);
          if (i + kWidth > count) {  // past the row's end: a NaN there is not ours
            alignas(64) float lanes[kWidth];
            y.store(lanes);
            for (int k = 0; k < kWidth; ++k) lanes[k] = i + k < count ? lanes[k] : 0.f;
            y = Vec::load(lanes);
          }
          y.store(x + i);
          constant = fma(y, Vec::load(w.zero_point + i), constant);
        } else {
          constant = constant + y;
        }
      }
      w.constant[r] = reduce_add(constant);
    }
    w.codes.find(item, token, tokens, c, count);
    qk_tile(w.x, width, item.rows, ByteRows{w.codes.rows}, round_up(tokens, kQkTokens), width,
            w.sum, kTileTokens);
    for (int r = 0; r < item.rows; ++r) {
      for (int t = 0; t < tokens; ++t) {
        float score = w.sum[r * kTileTokens + t];
        if (a.channel_stride) {
          score -= w.constant[r];
        } else {
          const int64_t pair = item.pair_of(token + t);
          score = a.scale[pair] * (score - a.zero[pair] * w.constant[r]);
        }
        float& out = w.out[r * kTileTokens + t];
        out = c ? out + score : score;
      }
    }
  }
  for (int r = 0; r < item.rows; ++r) {
    store_row(p.out, item.out_row(r) * p.tokens + token, p.dtype, tokens, w.out + r * kTileTokens);
  }
}

// out += what a run of tokens contributes to channels [c, c + count).
void pv_run(const Item& item, int begin, int end, int c, int count, Workspace& w) {
  const Affine& a = item.p.affine;
  const int width = round_up(count, 16);
  for (int r = 0; r < item.rows; ++r) {
    w.constant[r] = 0.f;
    for (int i = 0; i < width; i += kWidth) zero().store(w.sum + r * width + i);
  }
  for (int token = begin; token < end; token += kTileTokens) {
    const int tokens = least(kTileTokens, end - token);
    for (int r = 0; r < item.rows; ++r) {
      float* const x = w.x + r * kTileTokens;
      item.load(r, token, tokens, x);
      float constant = 0.f;
      for (int t = 0; t < tokens; ++t) {
        if (a.channel_stride == 0) {
          const int64_t pair = item.pair_of(token + t);
          x[t] *= a.scale[pair];
          constant += x[t] * a.zero[pair];
        } else {
          constant += x[t];
        }
      }
      w.constant[r] += constant;
    }
    w.codes.find(item, token, tokens, c, count);
    pv_tile(w.x, kTileTokens, item.rows, ByteRows{w.codes.rows}, tokens, width, w.unit, w.sum,
            width);
  }
  if (a.channel_stride) load_channel_pairs(item, begin, c, count, w);
  for (int r = 0; r < item.rows; ++r) {
    const Vec constant = Vec::set(w.constant[r]);
    for (int i = 0; i < width; i += kWidth) {
      const Vec sum = Vec::load(w.sum + r * width + i);
      const Vec part = a.channel_stride
                           ? Vec::load(w.scale + i) * (sum - Vec::load(w.zero_point + i) * constant)
                           : sum - constant;
      float* const out = w.out + r * width + i;
      (Vec::load(out) + part).store(out);
    }
  }
}

template <class F>
Status for_items(const MatmulParams& p, int threads, int64_t parts, const F& f) {
  const int64_t tiles = ceil_div(int64_t(p.heads / p.kv_heads) * p.rows, kTileRows);
  const int64_t items = int64_t(p.batch) * p.kv_heads * tiles * parts;
  if (p.tokens == 0 && parts == 0) return Status::ok();
  bool failed = false;
  const int64_t work = int64_t(p.batch) * p.kv_heads * tiles * p.tokens * p.dim;
  parallel(worth(threads, work), items, [&](int64_t i) {
    auto* const w = static_cast<Workspace*>(thread_scratch(Scratch::kWorker, sizeof(Workspace)));
    if (!w) return __atomic_store_n(&failed, true, __ATOMIC_RELAXED);
    f(Item(p, i / (tiles * parts), int(i / parts % tiles)), int(i % parts), *w);
  });
  return failed ? Status::device("matmul: out of memory") : Status::ok();
}

}  // namespace

Status qk_matmul(const MatmulParams& p, int threads) {
  return for_items(p, threads, ceil_div(p.tokens, kItemTokens),
                   [&](const Item& item, int part, Workspace& w) {
                     const int end = least(p.tokens, (part + 1) * kItemTokens);
                     for (int token = part * kItemTokens; token < end;) {
                       const int run = least(item.run_end(token, end), token + kTileTokens);
                       qk_run(item, token, run - token, w);
                       token = run;
                     }
                   });
}

Status pv_matmul(const MatmulParams& p, int threads) {
  return for_items(
      p, threads, ceil_div(p.dim, kPiece), [&](const Item& item, int part, Workspace& w) {
        const int c = part * kPiece, count = least(kPiece, p.dim - c);
        const int width = round_up(count, 16);
        for (int i = 0; i < item.rows * width; i += kWidth) zero().store(w.out + i);
        for (int r = 0; r < item.rows; ++r) w.unit[r] = 1.f;
        for (int token = 0; token < p.tokens;) {
          const int end = item.run_end(token, p.tokens);
          pv_run(item, token, end, c, count, w);
          token = end;
        }
        for (int r = 0; r < item.rows; ++r) {
          store_row(p.out, item.out_row(r) * p.dim + c, p.dtype, count, w.out + r * width);
        }
      });
}

}  // namespace kvquant::cpu::KVQUANT_ISA
