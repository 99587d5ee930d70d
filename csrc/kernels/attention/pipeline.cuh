// A warp's tokens on their way to the tensor core. RegisterPipeline: rows go straight into
// registers, the next tokens' where the last ones' were used up. SmemPipeline: rows wait in slots
// of shared memory that copies fill without waiting; where accumulators leave few registers.
#pragma once

#include "kernels/attention/new_tokens.cuh"

namespace kvquant::cuda {

// A lane's pieces of 16 tokens' rows, in global memory or in shared.
template <class Traits>
struct LanePieces {
  using Key = typename Traits::Key;
  using Value = typename Traits::Value;
  using Keys = KeyTile<Key, Traits::kDim, Traits::template kKeyColumns<Key>>;
  using Values = ValueTile<Value, Traits::kDim>;
  static constexpr int kKeyTokens = 2 * Keys::kColumns, kKeyStep = 2 / Keys::kColumns;
  int k_dim, v_dim, g, t;

  // The tokens, of 16, whose keys a lane has as j, and whose values as i.
  __device__ __forceinline__ int key_token(int j) const {
    return 4 * (g >> 1) + (Keys::kColumns == 1 ? g & 1 : 0) + kKeyStep * j;
  }
  __device__ __forceinline__ int value_token(int i) const { return 4 * t + i; }

  __device__ __forceinline__ int key_bytes() const { return Key::code_bytes(k_dim); }
  __device__ __forceinline__ int value_bytes() const { return Value::code_bytes(v_dim); }

  // Where the first piece of a row is, and of this lane's first row.
  __device__ __forceinline__ int first_key() const { return Keys::first_byte(k_dim, g, t); }
  __device__ __forceinline__ int first_value() const { return Values::first_byte(v_dim, g); }
  __device__ __forceinline__ int key_offset() const {
    return key_token(0) * key_bytes() + first_key();
  }
  __device__ __forceinline__ int value_offset() const {
    return value_token(0) * value_bytes() + first_value();
  }

  // `first`: the row's first piece.
  template <bool kShared>
  __device__ __forceinline__ void load_key(Keys& keys, int j, const uint8_t* first) const {
    keys.template load_row<kShared>(j, first, k_dim, g, t);
  }
  template <bool kShared>
  __device__ __forceinline__ void load_value(Values& values, int i, const uint8_t* first) const {
    values.template load_row<kShared>(i, first, v_dim, g);
  }
  // `first`: the first piece of this lane's first row.
  template <bool kShared>
  __device__ __forceinline__ void load_keys(Keys& keys, const uint8_t* first) const {
#pragma unroll
    for (int j = 0; j < kKeyTokens; ++j) {
      load_key<kShared>(keys, j, first + j * kKeyStep * key_bytes());
    }
  }
  template <bool kShared>
  __device__ __forceinline__ void load_values(Values& values, const uint8_t* first) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) load_value<kShared>(values, i, first + i * value_bytes());
  }
};

// A head's rows in one slab: those of block 0 from `offset` on, and what a block adds, in 16 bytes.
struct Stream {
  const uint8_t* base;
  uint32_t block16;

  __device__ __forceinline__ Stream() {}
  __device__ __forceinline__ Stream(const Slab& slab, int head, int offset)
      : base(rows_of<uint8_t>(slab, 0, head) + offset), block16(uint32_t(slab.block_stride >> 4)) {}
  // It is worked out here and kept in a register.
  __device__ __forceinline__ Stream& keep() {
    asm volatile("" : "+l"(base));
    return *this;
  }
  __device__ __forceinline__ const uint8_t* at(int block, int row, int bytes) const {
    return offset_by(offset_by(base, uint32_t(block) * 16u, block16), row, bytes);
  }
};

// Both have the same interface. find() works out addresses of a lane, place() those of a tile. A
// piece is what a warp takes at once, Traits::kTiles tiles; the oldest one's keys and values are
// read, then its slot is asked to take a later one: first for keys, then for values. close() ends
// what is asked for a piece. Of block -1, which is none, the first one is read, and usable() says
// so; `block` is the one that was asked for last. A tile whose first token is `at` takes new rows
// where it has them.

template <class Traits>
class RegisterPipeline {
  using Lane = LanePieces<Traits>;
  using Keys = typename Lane::Keys;
  using Values = typename Lane::Values;
  using KeyParams = decltype(Keys::params);
  using ValueParams = decltype(Values::params);

 public:
  static constexpr int kSharedBytes = 0;  // of a stage of a warp
  static constexpr int kGroups = 0;       // of copies, a piece
  // Where a tile's rows begin, the same for all lanes of a warp, or what this lane reads of them.
  struct Place {
    const uint8_t *k_codes, *k_params, *v_codes, *v_params;
  };

  __device__ __forceinline__ explicit RegisterPipeline(const AttentionCall& call) : call_(call) {}
  __device__ __forceinline__ void find(int head, unsigned char*, int) {
    pieces_ = {call_.cache.k.head_dim, call_.cache.v.head_dim, int(threadIdx.x & 31) >> 2,
               int(threadIdx.x & 3)};
#pragma unroll
    for (int u = 0; u < Traits::kTiles; ++u) keys_[u] = {}, values_[u] = {};
    find_head(head);
  }
  __device__ __forceinline__ void find_head(int head) {
    k_codes_ = of_head(call_.k_codes, head), k_params_ = of_head(call_.k_params, head);
    v_codes_ = of_head(call_.v_codes, head), v_params_ = of_head(call_.v_params, head);
    key_offset_ = kept(pieces_.key_offset()), value_offset_ = kept(pieces_.value_offset());
    token_ = kept(pieces_.value_token(0));
  }
  __device__ __forceinline__ constexpr int stages() const { return 1; }
  __device__ __forceinline__ void wait_stage() {}
  __device__ __forceinline__ bool usable(int, int block) const { return block >= 0; }
  __device__ __forceinline__ const Keys& keys(int u) const { return keys_[u]; }
  __device__ __forceinline__ const auto& value_params(int u) const { return values_[u].params; }
  __device__ __forceinline__ const Values& values(int u) const { return values_[u]; }
  __device__ __forceinline__ Place place(int block, int row) const {
    block = max(block, 0);
    return {k_codes_.at(block, row, pieces_.key_bytes()),
            k_params_.at(block, row, KeyParams::kBytes),
            v_codes_.at(block, row, pieces_.value_bytes()),
            v_params_.at(block, row, ValueParams::kBytes)};
  }
  __device__ __forceinline__ void load_keys(int u, const Place& from) {
    pieces_.template load_keys<false>(keys_[u], from.k_codes + key_offset_);
    load_params(keys_[u].params, from.k_params);
  }
  __device__ __forceinline__ void load_values(int u, const Place& from) {
    pieces_.template load_values<false>(values_[u], from.v_codes + value_offset_);
    load_params(values_[u].params, from.v_params);
  }
  // The same by lanes' places, which advance() moves by so many rows of a block.
  __device__ __forceinline__ Place of_lane(const Place& place) const {
    return {place.k_codes + key_offset_, place.k_params + token_ * KeyParams::kBytes,
            place.v_codes + value_offset_, place.v_params + token_ * ValueParams::kBytes};
  }
  __device__ __forceinline__ void advance(Place& place, int rows) const {
    place.k_codes += rows * pieces_.key_bytes(), place.k_params += rows * KeyParams::kBytes;
    place.v_codes += rows * pieces_.value_bytes(), place.v_params += rows * ValueParams::kBytes;
  }
  __device__ __forceinline__ void load_lane_keys(int u, const Place& from) {
    pieces_.template load_keys<false>(keys_[u], from.k_codes);
  }
  __device__ __forceinline__ void load_lane_key_params(int u, const Place& from) {
    keys_[u].params.words = load_keep<typename KeyParams::Words>(from.k_params);
  }
  __device__ __forceinline__ void load_lane_values(int u, const Place& from) {
    pieces_.template load_values<false>(values_[u], from.v_codes);
    values_[u].params.words = load_keep<typename ValueParams::Words>(from.v_params);
  }
  __device__ __forceinline__ void commit_stage() {}
  __device__ __forceinline__ void take_new(int u, int at, const NewTokens<Traits>& new_tokens) {
    const auto find = [&](int token) {
      return at + token < new_tokens.end ? at + token - new_tokens.begin : -1;
    };
#pragma unroll
    for (int j = 0; j < Lane::kKeyTokens; ++j) {
      const int i = find(pieces_.key_token(j));
      if (i < 0) continue;
      pieces_.template load_key<true>(keys_[u], j, new_tokens.keys.codes[i] + pieces_.first_key());
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int i = find(pieces_.value_token(j));
      if (i < 0) continue;
      keys_[u].params.set(j, new_tokens.keys.params[i]);
      values_[u].params.set(j, new_tokens.values.params[i]);
      pieces_.template load_value<true>(values_[u], j,
                                        new_tokens.values.codes[i] + pieces_.first_value());
    }
  }

 private:
  const AttentionCall& call_;
  Lane pieces_;
  Strided k_codes_, k_params_, v_codes_, v_params_;  // of the head
  uint32_t key_offset_, value_offset_, token_;       // of this lane's first rows in a tile
  Keys keys_[Traits::kTiles];
  Values values_[Traits::kTiles];

  // In uniform registers, where there are some: a call of all features needs them for these.
  static __device__ __forceinline__ Strided of_head(const Strided& slab, int head) {
    Strided rows = slab.of_head(head);
    if (Traits::kPlainCall) rows.data = uniform(rows.data);
    return rows;
  }
  template <class Params>
  __device__ __forceinline__ void load_params(Params& params, const uint8_t* from) const {
    params.words = load_keep<typename Params::Words>(from + token_ * Params::kBytes);
  }
};

template <class Traits>
class SmemPipeline {
  static constexpr int kDim = Traits::kDim;
  using Key = typename Traits::Key;
  using Value = typename Traits::Value;
  using Lane = LanePieces<Traits>;
  using Keys = typename Lane::Keys;
  using Values = typename Lane::Values;
  struct Slot {  // rows as they are in the cache
    alignas(16) uint8_t k[kTile * Key::code_bytes(kDim)];
    alignas(16) uint8_t v[kTile * Value::code_bytes(kDim)];
    alignas(16) typename Key::Params k_params[kTile];
    alignas(16) typename Value::Params v_params[kTile];  // right behind
  };
  using Piece = Slot[Traits::kTiles];
  // 32 rows' accumulators leave none for addresses.
  static constexpr bool kKept = Traits::kShape.has_room() && Traits::kRowSets < 4;
  // Lanes that copy a tile's params, 16 bytes each.
  static constexpr int kKeyLanes = kTile * sizeof(typename Key::Params) / 16;
  static constexpr int kValueLanes = kTile * sizeof(typename Value::Params) / 16;

 public:
  static constexpr int kSharedBytes = sizeof(Piece);
  static constexpr int kGroups = 1;  // of copies, a piece
  struct Place {
    int block, row;
  };
  static_assert(Traits::kTiles == 1);

  __device__ __forceinline__ explicit SmemPipeline(const AttentionCall& call)
      : cache_(call.cache) {}
  __device__ __forceinline__ void find(int head, unsigned char* memory, int stages) {
    lane_ = threadIdx.x & 31;
    pieces_ = {cache_.k.head_dim, cache_.v.head_dim, lane_ >> 2, lane_ & 3};
    head_ = head;
    first_ = reinterpret_cast<Piece*>(memory) + uniform(threadIdx.x / 32 * stages);
    stages_ = stages;
    if (!kKept) return;
    k_ = stream(cache_.k.codes, lane_).keep(), v_ = stream(cache_.v.codes, lane_).keep();
    params_ = params_stream().keep();
  }
  __device__ __forceinline__ int stages() const { return stages_; }
  // For the oldest piece, which all lanes have copied.
  __device__ __forceinline__ void wait_stage() {
    wait_copies<kMaxStages - 1>(stages_ - 1);
    __syncwarp();
  }
  __device__ __forceinline__ bool usable(int u, int) const { return !(lost_ & bit(u)); }
  __device__ __forceinline__ Keys keys(int u) const {
    const Slot& slot = first_[oldest_][u];
    Keys keys;
    pieces_.template load_keys<true>(keys, slot.k + pieces_.key_offset());
    keys.params.words = words_of(keys.params, slot.k_params);
    return keys;
  }
  __device__ __forceinline__ auto value_params(int u) const {
    decltype(Values::params) params;
    params.words = words_of(params, first_[oldest_][u].v_params);
    return params;
  }
  __device__ __forceinline__ Values values(int u) const {
    Values values;
    pieces_.template load_values<true>(values, first_[oldest_][u].v + pieces_.value_offset());
    return values;
  }
  // Nothing yet: copies would be seen by lanes that still read values.
  __device__ __forceinline__ Place place(int block, int row) const { return {block, row}; }
  __device__ __forceinline__ void load_keys(int, const Place&) {}
  __device__ __forceinline__ void load_values(int u, const Place& from) {
    const int block = max(from.block, 0), row = from.row;
    Slot& slot = first_[oldest_][u];
    lost_ = from.block < 0 ? lost_ | bit(u) : lost_ & ~bit(u);
    if (u == 0) __syncwarp();  // all lanes have read the piece
    const Stream params = kKept ? params_ : params_stream();
    if (lane_ < kKeyLanes + kValueLanes) {
      const int bytes =
          lane_ < kKeyLanes ? sizeof(typename Key::Params) : sizeof(typename Value::Params);
      copy_async<16>(reinterpret_cast<uint4*>(slot.k_params) + lane_, params.at(block, row, bytes));
    }
    const Stream keys = kKept ? k_ : stream(cache_.k.codes, lane_);
    copy_rows(slot.k, keys.at(block, row, pieces_.key_bytes()), kTile * pieces_.key_bytes());
    const Stream values = kKept ? v_ : stream(cache_.v.codes, lane_);
    copy_rows(slot.v, values.at(block, row, pieces_.value_bytes()), kTile * pieces_.value_bytes());
  }
  __device__ __forceinline__ void commit_stage() {
    close_copies();
    if (++oldest_ == stages_) oldest_ = 0;
  }
  __device__ __forceinline__ void take_new(int u, int at, const NewTokens<Traits>& new_tokens) {
    Slot& slot = first_[oldest_][u];
    const auto copy = [&](uint8_t* to, const uint8_t* from, int bytes) {
      if (lane_ * 8 >= bytes) return;
      reinterpret_cast<uint2*>(to)[lane_] = reinterpret_cast<const uint2*>(from)[lane_];
    };
#pragma unroll 1
    for (int token = max(at, new_tokens.begin); token < min(at + kTile, new_tokens.end); ++token) {
      const int i = token - new_tokens.begin, row = token - at;
      copy(slot.k + row * pieces_.key_bytes(), new_tokens.keys.codes[i], pieces_.key_bytes());
      copy(slot.v + row * pieces_.value_bytes(), new_tokens.values.codes[i], pieces_.value_bytes());
      if (lane_ == 0) slot.k_params[row] = new_tokens.keys.params[i];
      if (lane_ == 1) slot.v_params[row] = new_tokens.values.params[i];
    }
    __syncwarp();
  }

 private:
  const CacheView& cache_;
  int lane_;
  Lane pieces_;
  int head_;
  Stream k_, v_, params_;  // kept
  Piece* first_;
  int stages_, oldest_ = 0;
  unsigned lost_ = 0;  // a bit a slot: it is of no block

  // This lane's four tokens of a tile's params.
  template <class Format>
  __device__ __forceinline__ auto words_of(const TileParams<Format>&,
                                           const typename Format::Params* params) const {
    return reinterpret_cast<const typename TileParams<Format>::Words*>(params)[pieces_.t];
  }
  // `from`: this lane's first 16 bytes.
  template <int kBytes>
  __device__ __forceinline__ void copy_rows(uint8_t (&to)[kBytes], const uint8_t* from,
                                            int bytes) const {
#pragma unroll
    for (int i = 0; i < (kBytes + 511) / 512; ++i) {
      const int at = i * 512 + lane_ * 16;
      if (at < bytes) copy_async<16>(to + at, from + i * 512);
    }
  }
  // Of 16-byte pieces from `piece` on; as RegisterPipeline's.
  __device__ __forceinline__ Stream stream(const Slab& slab, int piece) const {
    int head = head_;
    if (!kKept) asm volatile("" : "+r"(head), "+r"(piece));
    return {slab, head, piece * 16};
  }
  __device__ __forceinline__ Stream params_stream() const {
    const Stream keys = stream(cache_.k.params, lane_ % kKeyLanes);
    const Stream values = stream(cache_.v.params, (lane_ + 32 - kKeyLanes) % kValueLanes);
    return lane_ < kKeyLanes ? keys : values;
  }
  __device__ __forceinline__ unsigned bit(int u) const {
    return 1u << (oldest_ * Traits::kTiles + u);
  }
};

template <class Traits>
using LoadPipeline =
    std::conditional_t<(Traits::kShape.stages > 0), SmemPipeline<Traits>, RegisterPipeline<Traits>>;

}  // namespace kvquant::cuda
