// What a block of rows_kernel has in shared memory, and how it gets there: the query, and tiles of
// 64 tokens, which come by the copy engine and whose values become fp16.
#pragma once

#include "common/age.h"
#include "kernels/attention/combine.cuh"
#include "kernels/rows/config.h"
#include "kernels/rows/query.cuh"

namespace kvquant::cuda {

// What codes of a value's row become halves with, each in both halves: (code - middle code) scale +
// middle.
struct ValueSteps {
  uint32_t scale, middle;
};
constexpr uint32_t kNanHalves = 0x7e007e00u;

template <class Traits>
struct RowsShared {
  static constexpr int kDim = Traits::kDim, kStages = Traits::kStages;
  // Young values have a byte a channel.
  static constexpr int kValueRoom = Traits::kByAge ? kDim : Traits::kValueBytes;

  RowsQuery<Traits> query;
  alignas(1024) uint8_t k[kStages][kRowsTile * kDim];  // unpacked where they are
  alignas(1024) __half values[kRowsTile * kDim];
  alignas(1024) uint8_t v[kStages][kRowsTile * kValueRoom];
  alignas(128) AffineParams k_params[kStages][kRowsTile];
  alignas(128) AffineParams v_params[kStages][kRowsTile];
  // Of the tile that is multiplied: keys' params as floats, values' as pairs of halves.
  alignas(16) RowAffine keys[kRowsTile];
  alignas(16) ValueSteps steps[kRowsTile];
  uint64_t full[kStages];  // barriers: the stage's tile is there
  uint32_t lost[kStages];  // pieces of the stage's tile that have no block: a bit each
  int is_clean[kStages];   // no score of the stage's tile needs a look
  RowView views[Traits::kRows];
  RowTile rows;
};

// The cache as the copy engine takes it, codes as [block, head, row, byte], params as [block, head,
// 1, row]; in boxes of a whole tile where blocks hold them, else codes alone, of 16 tokens. By age
// codes of young rows too, as [sequence, head, row, byte], in boxes of kYoungBox.
struct RowsMaps {
  CUtensorMap k, v, k_params, v_params, young_k, young_v;
};
// The ring of young rows begins behind the first group and is a group and a box long, and groups
// are whole tiles (regimes.cpp): no box wraps around.
constexpr int kYoungBox = kSpareTokens;
static_assert(kRowsTile % kYoungBox == 0);

// Which tokens are young: none, or those of the first group and from one on. A tile's are alike.
struct RowsAges {
  int group = 0, from = 0;

  RowsAges() = default;
  __device__ __forceinline__ RowsAges(const AttentionCall& p, const RowTile& rows)
      : group(chunk_tokens(p.cache)), from(read_from(group, rows.length, rows.tokens)) {}
  __device__ __forceinline__ bool are_young(int token) const {
    return token < group || token >= from;
  }
};

// Which tokens of a split are stored, and which tiles need no look at single scores: those that
// begin from clean_begin to clean_end. From new_begin on the launch before may still write.
struct RowsSpan {
  int begin, end, first_stored, clean_begin, clean_end, new_begin;

  // For the rows, or the mean, of what ends before a token.
  __device__ __forceinline__ void await(int token_end) const {
    if (token_end > new_begin) wait_for_writes();
  }
};

// Tiles on their way, as a whole where a block of the cache holds them, else in pieces of 16
// tokens. Two warps ask for them in turn, those that have less to do in prepare_params.
template <class Traits>
class RowsPipeline {
  static constexpr int kDim = Traits::kDim, kPieces = kRowsTile / kTile;
  static constexpr int kParams = sizeof(AffineParams);
  static constexpr int kRowBytes = Traits::kKeyBytes + Traits::kValueBytes + 2 * kParams;
  static constexpr int kAskers = 2;

 public:
  __device__ __forceinline__ RowsPipeline(const AttentionCall& p, const RowsMaps& maps,
                                          const Paging& paging, RowsShared<Traits>& shared,
                                          const RowTile& rows, const RowsSpan& span,
                                          const RowsAges& ages, int warp)
      : p_(p),
        maps_(maps),
        paging_(paging),
        shared_(shared),
        sequence_(rows.sequence),
        head_(rows.head),
        span_(span),
        ages_(ages) {
    table_ = p.seqs.block_table + rows.sequence * p.seqs.block_table_stride;
    is_whole_ = paging.shift >= log2_of(kRowsTile);
    next_ = warp < kAskers ? span.begin + warp * kRowsTile : 1 << 30;
    if (next_ < span.end) ask_entries();
#pragma unroll
    for (int i = 0; i < Traits::kStages; ++i) load(span.begin + i * kRowsTile, i);
  }
  // Asks for the tile at `token`, behind the one that was asked for last.
  __device__ __forceinline__ void load(int token, int stage) {
    if (token != next_ || token >= span_.end) return;
    span_.await(token + kRowsTile);
    const int found = checked_block(p_.cache, entry_), block = max(found, 0);
    const uint32_t lost = __ballot_sync(kFullWarp, found < 0) & ((1u << kPieces) - 1);
    const uint32_t barrier = shared_address(&shared_.full[stage]);
    const int pieces = is_whole_ ? kPieces : min(kPieces, (span_.end - token + kTile - 1) / kTile);
    const bool are_young = Traits::kByAge && ages_.are_young(token);
    if (is_elected()) {
      shared_.lost[stage] = lost;
      shared_.is_clean[stage] = token >= span_.clean_begin && token <= span_.clean_end && !lost;
      expect_bytes(barrier,
                   are_young ? kRowsTile * 2 * (kDim + kParams) : pieces * kTile * kRowBytes);
    }
    if (are_young) {
      if (is_elected()) {
#pragma unroll
        for (int i = 0; i < kRowsTile; i += kYoungBox) copy_young(stage, i, token + i, barrier);
      }
    } else if (is_whole_) {
      const int from = uniform(block), row = token & paging_.mask;
      if (is_elected()) {
        copy_codes(stage, 0, from, row, barrier);
        const auto copy = [&](auto* to, const CUtensorMap& map) {
          copy_box(shared_address(to) + stage * kRowsTile * kParams, map, row, 0, head_, from,
                   barrier);
        };
        copy(shared_.k_params, maps_.k_params);
        copy(shared_.v_params, maps_.v_params);
      }
    } else {
#pragma unroll 1
      for (int piece = 0; piece < pieces; ++piece) {
        const int from = uniform(__shfl_sync(kFullWarp, block, piece)), first = piece * kTile;
        if (is_elected()) copy_piece(stage, first, from, (token + first) & paging_.mask, barrier);
        __syncwarp();
      }
    }
    next_ += kAskers * kRowsTile;
    ask_entries();
  }

 private:
  const AttentionCall& p_;
  const RowsMaps& maps_;
  const Paging& paging_;
  RowsShared<Traits>& shared_;
  const int32_t* table_;  // of the sequence
  int sequence_, head_;
  const RowsSpan& span_;
  const RowsAges& ages_;
  bool is_whole_;
  int next_;   // token of the tile that this warp asks for next
  int entry_;  // of the table, for that tile: of piece lane % 4

  __device__ __forceinline__ void ask_entries() {
    const int at = next_ + (threadIdx.x & (kPieces - 1)) * kTile;
    entry_ = load_early(table_ + min(at >> paging_.shift, p_.seqs.max_blocks - 1));
  }
  // To the rows of the stage from `first` on. A box may reach beyond a block's end, where it has
  // zeros.
  __device__ __forceinline__ void copy_codes(int stage, int first, int block, int row,
                                             uint32_t barrier) const {
    copy_box(shared_address(shared_.k[stage]) + first * Traits::kKeyBytes, maps_.k, 0, row, head_,
             block, barrier);
    copy_box(shared_address(shared_.v[stage]) + first * Traits::kValueBytes, maps_.v, 0, row, head_,
             block, barrier);
  }
  __device__ __forceinline__ void copy_piece(int stage, int first, int block, int row,
                                             uint32_t barrier) const {
    copy_codes(stage, first, block, row, barrier);
    // Boxes go to multiples of 128 bytes.
    const auto copy = [&](auto* to, const Strided& from) {
      copy_bulk(shared_address(to) + (stage * kRowsTile + first) * kParams,
                from.of_head(head_).at(block, row, kParams), kTile * kParams, barrier);
    };
    copy(shared_.k_params, p_.k_params);
    copy(shared_.v_params, p_.v_params);
  }
  // kYoungBox rows, those from `token` on.
  __device__ __forceinline__ void copy_young(int stage, int first, int token,
                                             uint32_t barrier) const {
    const int row = young_row(ages_.group, token), place = first * kDim;
    copy_box(shared_address(shared_.k[stage]) + place, maps_.young_k, 0, row, head_, sequence_,
             barrier);
    copy_box(shared_address(shared_.v[stage]) + place, maps_.young_v, 0, row, head_, sequence_,
             barrier);
    const Young young(p_.cache, p_.seqs, sequence_, head_, ages_.from);
    const auto copy = [&](auto* to, bool of_keys) {
      copy_bulk(shared_address(to) + (stage * kRowsTile + first) * kParams,
                young.params(of_keys, row), kYoungBox * kParams, barrier);
    };
    copy(shared_.k_params, true);
    copy(shared_.v_params, false);
  }
};

// Keys of fewer bits become bytes in their place, as the products take them. All threads must call,
// and publish what they have written.
template <class Traits>
__device__ __forceinline__ void unpack_keys(uint8_t* keys) {
  using Codes = LaneCodes<typename Traits::Key>;
  using Word = typename Codes::Word;
  constexpr int kPieces = Traits::kDim / kLaneChannels;  // of a row
  constexpr int kTurns = kRowsTile * kPieces / Traits::kThreads;
  Word words[kTurns];
#pragma unroll
  for (int i = 0; i < kTurns; ++i) {
    const int piece = i * Traits::kThreads + threadIdx.x;  // of all
    words[i] = load_shared<Word>(shared_address(keys) + piece * int(sizeof(Word)));
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kTurns; ++i) {
    const int piece = i * Traits::kThreads + threadIdx.x;
    const int place = Swizzle<Traits::kDim>::place(piece / kPieces, piece % kPieces);
    *reinterpret_cast<uint4*>(keys + place) = Codes::bytes(words[i]);
  }
}

// A tile's params, as its keys and values are multiplied with, by a thread each. Values that may
// not be read count as zero. Those that are not finite are NaN where every row sees them, else
// zero: mask_rows tells who sees them.
template <class Traits>
__device__ __forceinline__ void prepare_params(RowsShared<Traits>& shared, int stage, int token,
                                               const RowsSpan& span, bool are_young) {
  static_assert(Traits::kThreads == 2 * kRowsTile);
  const int row = threadIdx.x % kRowsTile;
  if (threadIdx.x < kRowsTile) {
    shared.keys[row] = affine_of(shared.k_params[stage][row]);
    return;
  }
  const RowAffine affine = affine_of(shared.v_params[stage][row]);
  const float code = are_young ? Int8::kMiddleCode : Traits::Value::kMiddleCode;
  const __half middle =
      __float2half_rn(fminf(fmaxf(fmaf(code, affine.scale, affine.offset), -kMaxAbs), kMaxAbs));
  // A code may stand for more than fp16 holds, by less than a step: then steps are shorter.
  const float inverse = are_young ? 1.f / Int8::kMiddleCode : 1.f / Traits::Value::kMiddleCode;
  const float most = (kMaxAbs - fabsf(__half2float(middle))) * inverse;
  ValueSteps steps{half2_bits(__half2half2(__float2half_rz(fminf(affine.scale, most)))),
                   half2_bits(__half2half2(middle))};
  const bool is_finite = affine.scale <= kMaxAbs;
  if (!is_finite) steps = {kNanHalves, kNanHalves};
  if (!shared.is_clean[stage]) {
    const bool is_there = token + row >= span.first_stored && token + row < span.end &&
                          !(shared.lost[stage] >> row / kTile & 1);
    if (!is_there || !is_finite) steps = {};
  }
  shared.steps[row] = steps;
}

// A tile's values in fp16: a row a token, of 64 columns; of 128 channels in two halves. Of each
// four channels the first two are among the left half of the columns, the others among the right
// one: so a thread's sums are of four neighbours. A thread converts 16 neighbouring channels of a
// row; threads that write at once meet different banks.
template <class Traits>
struct RowsValues {
  using Codes = LaneCodes<typename Traits::Value>;
  static constexpr int kDim = Traits::kDim, kPieces = kDim / 16;  // of a row
  static constexpr int kRowsAtOnce = Traits::kThreads / kPieces;
  static constexpr int kHalfBytes = kRowsTile * 128;

  // A thread's codes of half of a tile, 0 or 1.
  static constexpr int kTurns = kRowsTile / kRowsAtOnce / 2;
  struct Half {
    using Word = typename Codes::Word;
    // Old and young codes as they are stored.
    std::conditional_t<Traits::kByAge, uint4, Word> codes[kTurns];
    ValueSteps steps[kTurns];
  };
  static __device__ __forceinline__ void ask(const RowsShared<Traits>& shared, int stage, int half,
                                             bool are_young, Half& x) {
    using Word = typename Codes::Word;
    const uint32_t codes = shared_address(shared.v[stage]);
    const int piece = threadIdx.x % kPieces;
#pragma unroll
    for (int i = 0; i < kTurns; ++i) {
      const int row = row_of(half * kTurns + i);
      if (Traits::kByAge && are_young) {
        const auto u = load_shared<uint4>(codes + (row * kPieces + piece) * int(sizeof(uint4)));
        memcpy(&x.codes[i], &u, sizeof(x.codes[i]));
      } else {
        const auto u = load_shared<Word>(codes + (row * kPieces + piece) * int(sizeof(Word)));
        memcpy(&x.codes[i], &u, sizeof(u));
      }
      x.steps[i] = shared.steps[row];
    }
  }
  static __device__ __forceinline__ void convert(RowsShared<Traits>& shared, int half,
                                                 bool are_young, const Half& x) {
    const int piece = threadIdx.x % kPieces;
    uint8_t* const to = reinterpret_cast<uint8_t*>(shared.values);
    // 1024 + the middle code, twice.
    const auto middle_of = [](float code) { return 0x64006400u + uint32_t(code) * 0x10001u; };
    const uint32_t middle_code = Traits::kByAge && are_young
                                     ? middle_of(Int8::kMiddleCode)
                                     : middle_of(Traits::Value::kMiddleCode);
#pragma unroll
    for (int i = 0; i < kTurns; ++i) {
      const int row = row_of(half * kTurns + i);
      const __half2 scale = bits_half2(x.steps[i].scale), middle = bits_half2(x.steps[i].middle);
      uint4 bytes;
      if (Traits::kByAge && are_young) {
        memcpy(&bytes, &x.codes[i], sizeof(x.codes[i]));
      } else {
        typename Codes::Word word;
        memcpy(&word, &x.codes[i], sizeof(word));
        bytes = Codes::bytes(word);
      }
      const uint32_t words[4] = {bytes.x, bytes.y, bytes.z, bytes.w};
      uint32_t left[4], right[4];
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const auto value = [&](uint32_t code) {
          const __half2 steps = bits_half2(sub_halves(code, middle_code));
          return half2_bits(__hfma2(steps, scale, middle));
        };
        left[w] = value(codes_low(words[w])), right[w] = value(codes_high(words[w]));
      }
      const auto store = [&](int place, const uint32_t (&x)[4]) {
        *reinterpret_cast<uint4*>(to + place) = make_uint4(x[0], x[1], x[2], x[3]);
      };
      store(Swizzle<128>::place(row, piece), left);
      store(kDim == 128 ? kHalfBytes + Swizzle<128>::place(row, piece)
                        : Swizzle<128>::place(row, piece + kPieces),
            right);
    }
  }

 private:
  // Of 64 channels, lanes that write at once have rows r and r + 4.
  static __device__ __forceinline__ int row_of(int turn) {
    const int tid = threadIdx.x;
    const int first = kDim == 64 ? tid / 32 * 8 + tid / 8 % 4 + (tid & 4) : tid / kPieces;
    return turn * kRowsAtOnce + first;
  }
  static __device__ __forceinline__ __half2 bits_half2(uint32_t u) {
    __half2 h;
    memcpy(&h, &u, 4);
    return h;
  }
};

}  // namespace kvquant::cuda
