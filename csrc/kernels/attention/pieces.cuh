// A warp's tokens on their way to the tensor core. Held: rows go straight into registers, the next
// tokens' where the last ones' were used up. Ring: rows wait in slots of shared memory that copies
// fill without waiting; where accumulators leave few registers, or blocks come in turns.
#pragma once

#include "kernels/attention/query.cuh"

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
template <int kDim, bool kShared>
struct LanePieces {
  static constexpr int kWide = kDim / 128;                 // 16-byte pieces of a value's row
  static constexpr int kFirstPiece = kDim < 128 ? 8 : 16;  // bytes of a value's first one
  int k_dim, v_dim, g, t;

  // Where the first piece is, from the first row on.
  __device__ __forceinline__ int first_key() const {
    return (4 * (g >> 1) + (g & 1)) * k_dim + min(t * 16, k_dim - 16);
  }
  __device__ __forceinline__ int first_value() const {
    return 4 * t * v_dim + min(g * kFirstPiece, v_dim - kFirstPiece);
  }

  // `first`: the lane's first piece.
  __device__ __forceinline__ void load_keys(Tile<kDim>& tile, const uint8_t* first) const {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int s = 0; s < kDim / 64; ++s) {
        const int step = min(s * 64 + t * 16, k_dim - 16) - min(t * 16, k_dim - 16);
        tile.k[j][s] = load<uint4>(first + j * 2 * k_dim + step);
      }
    }
  }
  __device__ __forceinline__ void load_values(Tile<kDim>& tile, const uint8_t* first) const {
    const auto step = [&](int at, int bytes) {
      return min(at, v_dim - bytes) - min(g * kFirstPiece, v_dim - kFirstPiece);
    };
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int s = 0; s < kWide; ++s) {
        const auto u = load<uint4>(first + i * v_dim + step(s * 128 + g * 16, 16));
        tile.v[i][4 * s] = u.x, tile.v[i][4 * s + 1] = u.y;
        tile.v[i][4 * s + 2] = u.z, tile.v[i][4 * s + 3] = u.w;
      }
      if constexpr (kDim % 128 != 0) {
        const auto u = load<uint2>(first + i * v_dim + step(kWide * 128 + g * 8, 8));
        tile.v[i][4 * kWide] = u.x, tile.v[i][4 * kWide + 1] = u.y;
      }
    }
  }

 private:
  template <class T>
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

  // kept: in registers; else it is worked out anew at each load, where these are short.
  __device__ __forceinline__ Stream(const Slab& slab, int head, int offset, bool kept)
      : base(rows_of<uint8_t>(slab, 0, head) + offset), block16(uint32_t(slab.block_stride >> 4)) {
    if (kept) asm volatile("" : "+l"(base));
  }
  __device__ __forceinline__ const uint8_t* at(int block, int row, int bytes) const {
    return offset_by(offset_by(base, uint32_t(block) * 16u, block16), row, bytes);
  }
};

// Both have the same interface. A piece is what a warp takes at once, Traits::kTiles tiles; the
// oldest one's keys and values are read, then its place is asked to take a later one: first for
// keys, then for values. close() ends what is asked for a piece. Of block -1, which is none, the
// first one is read, and usable() says so; `block` is the one that was asked for last.

template <class Traits>
class Held {
  using Lane = LanePieces<Traits::kDim, false>;
  static constexpr bool kKept = Traits::kShape.blocks == 1;

 public:
  static constexpr int kSharedBytes = 0;  // of a stage of a warp
  static constexpr int kGroups = 0;       // of copies, a piece

  __device__ __forceinline__ Held(const CacheView& cache, int head, unsigned char*, int)
      : pieces_{cache.k_dim, cache.v_dim, int(threadIdx.x & 31) >> 2, int(threadIdx.x & 3)},
        k_(cache.k_data, head, pieces_.first_key(), kKept),
        v_(cache.v_data, head, pieces_.first_value(), kKept),
        k_params_(cache.k_params, head, 16 * pieces_.t, kKept),
        v_params_(cache.v_params, head, 16 * pieces_.t, kKept),
        tile_{} {}

  __device__ __forceinline__ constexpr int stages() const { return 1; }
  __device__ __forceinline__ void wait_keys() {}
  __device__ __forceinline__ void wait_values() {}
  __device__ __forceinline__ bool usable(int, int block) const { return block >= 0; }
  __device__ __forceinline__ const Tile<Traits::kDim>& keys(int u) const { return tile_[u]; }
  __device__ __forceinline__ const Tile<Traits::kDim>& values(int u) const { return tile_[u]; }
  __device__ __forceinline__ void ask_keys(int u, int block, int row) {
    block = max(block, 0);
    pieces_.load_keys(tile_[u], k_.at(block, row, pieces_.k_dim));
    tile_[u].k_params = load_keep(k_params_.at(block, row, 4));
  }
  __device__ __forceinline__ void ask_values(int u, int block, int row) {
    block = max(block, 0);
    pieces_.load_values(tile_[u], v_.at(block, row, pieces_.v_dim));
    tile_[u].v_params = load_keep(v_params_.at(block, row, 4));
  }
  __device__ __forceinline__ void ask_nothing() {}
  __device__ __forceinline__ void close() {}

 private:
  Lane pieces_;
  Stream k_, v_, k_params_, v_params_;
  Tile<Traits::kDim> tile_[Traits::kTiles];
};

template <class Traits>
class Ring {
  static constexpr int kDim = Traits::kDim;
  using Lane = LanePieces<kDim, true>;
  struct Slot {  // rows as they are in the cache
    alignas(16) uint8_t k[16 * kDim], v[16 * kDim];
    uint4 params[2][4];  // of keys, of values
  };
  using Piece = Slot[Traits::kTiles];

 public:
  static constexpr int kSharedBytes = sizeof(Piece);
  static constexpr int kGroups = Traits::kShape.apart ? 2 : 1;  // of copies, a piece
  static_assert(Traits::kTiles == 1);

  __device__ __forceinline__ Ring(const CacheView& cache, int head, unsigned char* memory,
                                  int stages)
      : lane_(threadIdx.x & 31),
        pieces_{cache.k_dim, cache.v_dim, lane_ >> 2, lane_ & 3},
        k_(cache.k_data, head, lane_ * 16, true),
        v_(cache.v_data, head, lane_ * 16, true),
        params_(lane_ < 4 ? cache.k_params : cache.v_params, head, lane_ % 4 * 16, true),
        first_(reinterpret_cast<Piece*>(memory) + threadIdx.x / 32 * stages),
        stages_(stages) {}

  __device__ __forceinline__ int stages() const { return stages_; }
  // For the oldest piece's keys, which all lanes have copied, then for its values.
  __device__ __forceinline__ void wait_keys() { wait(kGroups * stages_ - 1); }
  __device__ __forceinline__ void wait_values() {
    if (kGroups == 2) wait(2 * stages_ - 2);
  }
  __device__ __forceinline__ bool usable(int u, int) const { return !(lost_ & bit(u)); }
  __device__ __forceinline__ Tile<kDim> keys(int u) const {
    const Slot& slot = first_[oldest_][u];
    Tile<kDim> tile;
    pieces_.load_keys(tile, slot.k + pieces_.first_key());
    tile.k_params = slot.params[0][pieces_.t];
    tile.v_params = slot.params[1][pieces_.t];
    return tile;
  }
  __device__ __forceinline__ Tile<kDim> values(int u) const {
    Tile<kDim> tile;
    pieces_.load_values(tile, first_[oldest_][u].v + pieces_.first_value());
    return tile;
  }
  // Nothing yet: copies would be seen by lanes that still read values.
  __device__ __forceinline__ void ask_keys(int, int, int) {}
  __device__ __forceinline__ void ask_values(int u, int block, int row) {
    Slot& slot = first_[oldest_][u];
    lost_ = block < 0 ? lost_ | bit(u) : lost_ & ~bit(u);
    block = max(block, 0);
    if (u == 0) __syncwarp();  // all lanes have read the piece
    if (lane_ < 8) copy_async<16>(&slot.params[0][lane_], params_.at(block, row, 4));
    const uint8_t* const key = k_.at(block, row, pieces_.k_dim);
    const uint8_t* const value = v_.at(block, row, pieces_.v_dim);
#pragma unroll
    for (int i = 0; i < kDim / 32; ++i) {
      const int at = i * 512 + lane_ * 16;
      if (at < 16 * pieces_.k_dim) copy_async<16>(slot.k + at, key + i * 512);
    }
    if (kGroups == 2) close_copies();
#pragma unroll
    for (int i = 0; i < kDim / 32; ++i) {
      const int at = i * 512 + lane_ * 16;
      if (at < 16 * pieces_.v_dim) copy_async<16>(slot.v + at, value + i * 512);
    }
  }
  // As many groups as if there were something.
  __device__ __forceinline__ void ask_nothing() {
    if (kGroups == 2) close_copies();
  }
  __device__ __forceinline__ void close() {
    close_copies();
    if (++oldest_ == stages_) oldest_ = 0;
  }

 private:
  int lane_;
  Lane pieces_;
  Stream k_, v_, params_;
  Piece* first_;
  int stages_, oldest_ = 0;
  unsigned lost_ = 0;  // a bit a slot: it is of no block

  __device__ __forceinline__ void wait(int left) {
    wait_copies<2 * kMaxStages - 1>(left);
    __syncwarp();
  }
  __device__ __forceinline__ unsigned bit(int u) const {
    return 1u << (oldest_ * Traits::kTiles + u);
  }
};

template <class Traits>
using Pieces = std::conditional_t<(Traits::kShape.stages > 0), Ring<Traits>, Held<Traits>>;

}  // namespace kvquant::cuda
