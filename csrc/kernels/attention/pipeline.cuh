// A warp's tokens on their way to the tensor core. RegisterPipeline: rows go straight into
// registers, the next tokens' where the last ones' were used up. SmemPipeline: rows wait in slots
// of shared memory that copies fill without waiting; where accumulators leave few registers.
#pragma once

#include "kernels/attention/new_tokens.cuh"

namespace kvquant::cuda {

// One warp's 16 tokens as a lane has them: the tensor core's operands.
template <int kDim>
struct Tile {
  uint4 k[2][kDim / 64];     // of token 4 (g >> 1) + (g & 1) + 2 j: channels 64 s + 16 t ...
  uint32_t v[4][kDim / 32];  // of token 4 t + i: word w, see value_channel
  uint4 k_params, v_params;  // of tokens 4 t .. 4 t + 3
};

// First value channel of word w of a lane.
template <int kDim>
__device__ __forceinline__ int value_channel(int w, int g) {
  constexpr int kWide = kDim / 128;
  return w < kWide * 4 ? (w / 4) * 128 + g * 16 + (w % 4) * 4
                       : kWide * 128 + g * 8 + (w - kWide * 4) * 4;
}

// A lane's pieces of 16 tokens' rows, in global memory or in shared. Lanes whose channels are
// beyond the row read other ones of it: they meet zeros of the query, or become channels that are
// not written.
template <int kDim>
struct LanePieces {
  static constexpr int kWide = kDim / 128;                 // 16-byte pieces of a value's row
  static constexpr int kFirstPiece = kDim < 128 ? 8 : 16;  // bytes of a value's first one
  int k_dim, v_dim, g, t;

  // The tokens, of 16, whose keys are k[j] and whose values are v[i].
  __device__ __forceinline__ int key_token(int j) const { return 4 * (g >> 1) + (g & 1) + 2 * j; }
  __device__ __forceinline__ int value_token(int i) const { return 4 * t + i; }

  // Where the first piece of a row is.
  __device__ __forceinline__ int first_key() const { return min(t * 16, k_dim - 16); }
  __device__ __forceinline__ int first_value() const {
    return min(g * kFirstPiece, v_dim - kFirstPiece);
  }

  // `first`: the row's first piece.
  template <bool kShared>
  __device__ __forceinline__ void load_key(Tile<kDim>& tile, int j, const uint8_t* first) const {
#pragma unroll
    for (int s = 0; s < kDim / 64; ++s) {
      const int step = min(s * 64 + t * 16, k_dim - 16) - first_key();
      tile.k[j][s] = load<uint4, kShared>(first + step);
    }
  }
  template <bool kShared>
  __device__ __forceinline__ void load_value(Tile<kDim>& tile, int i, const uint8_t* first) const {
    const auto step = [&](int at, int bytes) { return min(at, v_dim - bytes) - first_value(); };
#pragma unroll
    for (int s = 0; s < kWide; ++s) {
      const auto u = load<uint4, kShared>(first + step(s * 128 + g * 16, 16));
      tile.v[i][4 * s] = u.x, tile.v[i][4 * s + 1] = u.y;
      tile.v[i][4 * s + 2] = u.z, tile.v[i][4 * s + 3] = u.w;
    }
    if constexpr (kDim % 128 != 0) {
      const auto u = load<uint2, kShared>(first + step(kWide * 128 + g * 8, 8));
      tile.v[i][4 * kWide] = u.x, tile.v[i][4 * kWide + 1] = u.y;
    }
  }
  // `first`: the first piece of this lane's first row.
  template <bool kShared>
  __device__ __forceinline__ void load_keys(Tile<kDim>& tile, const uint8_t* first) const {
#pragma unroll
    for (int j = 0; j < 2; ++j) load_key<kShared>(tile, j, first + j * 2 * k_dim);
  }
  template <bool kShared>
  __device__ __forceinline__ void load_values(Tile<kDim>& tile, const uint8_t* first) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) load_value<kShared>(tile, i, first + i * v_dim);
  }

 private:
  template <class T, bool kShared>
  static __device__ __forceinline__ T load(const uint8_t* p) {
    if constexpr (kShared) {
      return *reinterpret_cast<const T*>(p);
    } else {
      return load_stream<T>(p);
    }
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

// Both have the same interface. find() works out addresses. A piece is what a warp takes at once,
// Traits::kTiles tiles; the oldest one's keys and values are read, then its place is asked to take
// a later one: first for keys, then for values. close() ends what is asked for a piece. Of block
// -1, which is none, the first one is read, and usable() says so; `block` is the one that was asked
// for last. A tile whose first token is `at` takes new rows where it has them.

template <class Traits>
class RegisterPipeline {
  using Lane = LanePieces<Traits::kDim>;
  static constexpr bool kKept = Traits::kShape.has_room();

 public:
  static constexpr int kSharedBytes = 0;  // of a stage of a warp
  static constexpr int kGroups = 0;       // of copies, a piece

  __device__ __forceinline__ explicit RegisterPipeline(const CacheView& cache) : cache_(cache) {}
  __device__ __forceinline__ void find(int head, unsigned char*, int) {
    pieces_ = {cache_.k_dim, cache_.v_dim, int(threadIdx.x & 31) >> 2, int(threadIdx.x & 3)};
    head_ = head;
#pragma unroll
    for (int u = 0; u < Traits::kTiles; ++u) tile_[u] = {};
    if (!kKept) return;
    k_ = stream(true, false).keep(), v_ = stream(false, false).keep();
    k_params_ = stream(true, true).keep(), v_params_ = stream(false, true).keep();
  }
  __device__ __forceinline__ constexpr int stages() const { return 1; }
  __device__ __forceinline__ void wait_stage() {}
  __device__ __forceinline__ bool usable(int, int block) const { return block >= 0; }
  __device__ __forceinline__ const Tile<Traits::kDim>& keys(int u) const { return tile_[u]; }
  __device__ __forceinline__ const Tile<Traits::kDim>& values(int u) const { return tile_[u]; }
  __device__ __forceinline__ void load_keys(int u, int block, int row) {
    block = max(block, 0);
    const Stream keys = kKept ? k_ : stream(true, false),
                 params = kKept ? k_params_ : stream(true, true);
    pieces_.template load_keys<false>(tile_[u], keys.at(block, row, pieces_.k_dim));
    tile_[u].k_params = load_keep(params.at(block, row, 4));
  }
  __device__ __forceinline__ void load_values(int u, int block, int row) {
    block = max(block, 0);
    const Stream values = kKept ? v_ : stream(false, false),
                 params = kKept ? v_params_ : stream(false, true);
    pieces_.template load_values<false>(tile_[u], values.at(block, row, pieces_.v_dim));
    tile_[u].v_params = load_keep(params.at(block, row, 4));
  }
  __device__ __forceinline__ void commit_stage() {}
  __device__ __forceinline__ void take_new(int u, int at, const NewTokens<Traits>& new_tokens) {
    const auto find = [&](int token) {
      return at + token < new_tokens.end ? at + token - new_tokens.begin : -1;
    };
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int i = find(pieces_.key_token(j));
      if (i >= 0)
        pieces_.template load_key<true>(tile_[u], j, new_tokens.keys[i] + pieces_.first_key());
    }
    uint32_t* const params[2] = {&tile_[u].k_params.x, &tile_[u].v_params.x};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int i = find(pieces_.value_token(j));
      if (i < 0) continue;
      params[0][j] = new_tokens.params[0][i], params[1][j] = new_tokens.params[1][i];
      pieces_.template load_value<true>(tile_[u], j, new_tokens.values[i] + pieces_.first_value());
    }
  }

 private:
  const CacheView& cache_;
  Lane pieces_;
  int head_;
  Stream k_, v_, k_params_, v_params_;  // kept
  Tile<Traits::kDim> tile_[Traits::kTiles];

  // Where registers are few it is worked out anew each time: that is hidden from the compiler.
  __device__ __forceinline__ Stream stream(bool of_keys, bool of_params) const {
    int head = head_;
    Lane at = pieces_;
    if (!kKept) asm volatile("" : "+r"(head), "+r"(at.g), "+r"(at.t));
    if (of_params) return {of_keys ? cache_.k_params : cache_.v_params, head, 16 * at.t};
    if (of_keys) return {cache_.k_data, head, at.key_token(0) * at.k_dim + at.first_key()};
    return {cache_.v_data, head, at.value_token(0) * at.v_dim + at.first_value()};
  }
};

template <class Traits>
class SmemPipeline {
  static constexpr int kDim = Traits::kDim;
  using Lane = LanePieces<kDim>;
  struct Slot {  // rows as they are in the cache
    alignas(16) uint8_t k[16 * kDim], v[16 * kDim];
    uint4 params[2][4];  // of keys, of values
  };
  using Piece = Slot[Traits::kTiles];
  // 32 rows' accumulators leave none for addresses.
  static constexpr bool kKept = Traits::kShape.has_room() && Traits::kRowSets < 4;

 public:
  static constexpr int kSharedBytes = sizeof(Piece);
  static constexpr int kGroups = 1;  // of copies, a piece
  static_assert(Traits::kTiles == 1);

  __device__ __forceinline__ explicit SmemPipeline(const CacheView& cache) : cache_(cache) {}
  __device__ __forceinline__ void find(int head, unsigned char* memory, int stages) {
    lane_ = threadIdx.x & 31;
    pieces_ = {cache_.k_dim, cache_.v_dim, lane_ >> 2, lane_ & 3};
    head_ = head;
    first_ = reinterpret_cast<Piece*>(memory) + threadIdx.x / 32 * stages;
    stages_ = stages;
    if (!kKept) return;
    k_ = stream(cache_.k_data, lane_).keep(), v_ = stream(cache_.v_data, lane_).keep();
    params_ = params_stream().keep();
  }
  __device__ __forceinline__ int stages() const { return stages_; }
  // For the oldest piece, which all lanes have copied.
  __device__ __forceinline__ void wait_stage() {
    wait_copies<kMaxStages - 1>(stages_ - 1);
    __syncwarp();
  }
  __device__ __forceinline__ bool usable(int u, int) const { return !(lost_ & bit(u)); }
  __device__ __forceinline__ Tile<kDim> keys(int u) const {
    const Slot& slot = first_[oldest_][u];
    Tile<kDim> tile;
    pieces_.template load_keys<true>(
        tile, slot.k + pieces_.key_token(0) * pieces_.k_dim + pieces_.first_key());
    tile.k_params = slot.params[0][pieces_.t];
    tile.v_params = slot.params[1][pieces_.t];
    return tile;
  }
  __device__ __forceinline__ Tile<kDim> values(int u) const {
    Tile<kDim> tile;
    pieces_.template load_values<true>(
        tile,
        first_[oldest_][u].v + pieces_.value_token(0) * pieces_.v_dim + pieces_.first_value());
    return tile;
  }
  // Nothing yet: copies would be seen by lanes that still read values.
  __device__ __forceinline__ void load_keys(int, int, int) {}
  __device__ __forceinline__ void load_values(int u, int block, int row) {
    Slot& slot = first_[oldest_][u];
    lost_ = block < 0 ? lost_ | bit(u) : lost_ & ~bit(u);
    block = max(block, 0);
    if (u == 0) __syncwarp();  // all lanes have read the piece
    const Stream params = kKept ? params_ : params_stream();
    if (lane_ < 8) copy_async<16>(&slot.params[0][lane_], params.at(block, row, 4));
    const Stream keys = kKept ? k_ : stream(cache_.k_data, lane_);
    const uint8_t* const key = keys.at(block, row, pieces_.k_dim);
#pragma unroll
    for (int i = 0; i < kDim / 32; ++i) {
      const int at = i * 512 + lane_ * 16;
      if (at < 16 * pieces_.k_dim) copy_async<16>(slot.k + at, key + i * 512);
    }
    const Stream values = kKept ? v_ : stream(cache_.v_data, lane_);
    const uint8_t* const value = values.at(block, row, pieces_.v_dim);
#pragma unroll
    for (int i = 0; i < kDim / 32; ++i) {
      const int at = i * 512 + lane_ * 16;
      if (at < 16 * pieces_.v_dim) copy_async<16>(slot.v + at, value + i * 512);
    }
  }
  __device__ __forceinline__ void commit_stage() {
    close_copies();
    if (++oldest_ == stages_) oldest_ = 0;
  }
  __device__ __forceinline__ void take_new(int u, int at, const NewTokens<Traits>& new_tokens) {
    Slot& slot = first_[oldest_][u];
    const auto copy = [&](uint8_t* to, const uint8_t* from, int bytes) {
      if (lane_ * 16 >= bytes) return;
      reinterpret_cast<uint4*>(to)[lane_] = reinterpret_cast<const uint4*>(from)[lane_];
    };
#pragma unroll 1
    for (int token = max(at, new_tokens.begin); token < min(at + kTile, new_tokens.end); ++token) {
      const int i = token - new_tokens.begin, row = token - at;
      copy(slot.k + row * pieces_.k_dim, new_tokens.keys[i], pieces_.k_dim);
      copy(slot.v + row * pieces_.v_dim, new_tokens.values[i], pieces_.v_dim);
      if (lane_ < 2)
        reinterpret_cast<uint32_t*>(slot.params[lane_])[row] = new_tokens.params[lane_][i];
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

  // Of 16-byte pieces from `piece` on; as RegisterPipeline's.
  __device__ __forceinline__ Stream stream(const Slab& slab, int piece) const {
    int head = head_;
    if (!kKept) asm volatile("" : "+r"(head), "+r"(piece));
    return {slab, head, piece * 16};
  }
  __device__ __forceinline__ Stream params_stream() const {
    const Stream keys = stream(cache_.k_params, lane_ % 4);
    const Stream values = stream(cache_.v_params, lane_ % 4);
    return lane_ < 4 ? keys : values;
  }
  __device__ __forceinline__ unsigned bit(int u) const {
    return 1u << (oldest_ * Traits::kTiles + u);
  }
};

template <class Traits>
using LoadPipeline =
    std::conditional_t<(Traits::kShape.stages > 0), SmemPipeline<Traits>, RegisterPipeline<Traits>>;

}  // namespace kvquant::cuda
