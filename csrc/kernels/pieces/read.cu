// Dequantizes a piece of every sequence's history for dense attention kernels, in the basis of the
// caller's rows. It is bound by memory: at most a byte an element is read, two are written.
#include "kernels/device.cuh"
#include "kernels/pieces/tile.cuh"

namespace kvquant::cuda {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * 32;
constexpr int kRows = 2;  // of a thread, on their way at once
constexpr int kTileWarps = 4, kTileThreads = kTileWarps * 32;

// What a block reads and where it goes. grid: (chunks of pieces' tokens, num_kv_heads, batch * 2):
// K and V are even and odd in z.
struct Task {
  Piece piece;
  int first;  // of the piece's tokens
  bool is_key;
  int sequence, head;
  const RowsView& rows;
  uint16_t* out;  // of the piece's first token

  // Of a kernel whose blocks take `count` tokens.
  __device__ __forceinline__ Task(const PieceParams& p, int count)
      : is_key(blockIdx.z % 2 == 0),
        sequence(blockIdx.z / 2),
        head(blockIdx.y),
        rows(is_key ? p.cache.k : p.cache.v) {
    int at = 0, chunk = blockIdx.x;
    const auto chunks = [&] { return (p.pieces[at].tokens + count - 1) / count; };
    for (; chunk >= chunks(); ++at) chunk -= chunks();
    piece = p.pieces[at], first = chunk * count;
    const int64_t row = (int64_t(sequence) * p.cache.num_kv_heads + head) * piece.tokens;
    out = static_cast<uint16_t*>(is_key ? piece.key : piece.value) + row * rows.head_dim;
  }
  __device__ __forceinline__ PieceRow row(const PieceParams& p, const Paging& paging, int i) const {
    return row_of_piece(p, piece, paging, is_key, sequence, head, i);
  }
};

// Rows of any kind.
__global__ void __launch_bounds__(kThreads, 3) read_rows(const PieceParams p) {
  const RowLanes at(blockIdx.z % 2 == 0 ? p.cache.k.head_dim : p.cache.v.head_dim);
  const Task task(p, kRows * kWarps * at.rows);
  const Paging paging(p.cache, p.seqs.max_blocks);
  const int first = task.first + int(threadIdx.x / 32) * at.rows + at.row;
  const auto row_index = [&](int r) {
    return at.row >= 0 ? first + r * kWarps * at.rows : task.piece.tokens;
  };
  float x[kRows][kLaneChannels] = {};
  RowAffine affine[kRows];
  const __half* mean[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const PieceRow row = task.row(p, paging, row_index(r));
    affine[r] = row.affine, mean[r] = row.mean;
    if (!row.codes) continue;
    with_format(row.format, RowFormats{}, [&](auto format) {
      LaneCodes<decltype(format)>::load(row.codes, at.channel(), x[r]);
    });
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    float shift[kLaneChannels] = {};
    if (mean[r]) load16(mean[r] + at.channel(), shift);
#pragma unroll
    for (int c = 0; c < kLaneChannels; ++c) {
      x[r][c] = fmaf(affine[r].scale, x[r][c], affine[r].offset) + shift[c];
    }
    rotate(x[r], task.rows.rotation, at);
    const int i = row_index(r);
    store_sixteen(task.out + int64_t(i) * task.rows.head_dim, x[r], at.channel(), p.dtype,
                  at.lanes % 2 == 0, at.index % 2, i < task.piece.tokens);
  }
}

// Rows that PieceTile takes.
template <int kDim>
__global__ void __launch_bounds__(kTileThreads, kDim > 128 ? 3 : 4)
    read_tiles(const PieceParams p) {
  __shared__ __align__(16) float means[kTileWarps][kDim];
  const Task task(p, kTileWarps * kTileTokens);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int first = task.first + warp * kTileTokens, i = first + lane;
  if (first >= task.piece.tokens) return;
  const Paging paging(p.cache, p.seqs.max_blocks);
  const PieceRow row = task.row(p, paging, i);
  uint16_t* const out = task.out + int64_t(first) * kDim;
  const bool has_mean = task.is_key && p.cache.mean_group;
  // A pass takes the tokens of one group and format; those without codes go with any.
  const int group = has_mean ? token_of(task.piece, i) >> paging.group_shift : 0;
  const int kind = row.codes ? group * RowFormats::kCount + int(row.format) : -1;
  const unsigned readable = __ballot_sync(kFullWarp, row.codes != nullptr);
  unsigned left = __ballot_sync(kFullWarp, i < task.piece.tokens);
  while (left) {
    const int lead = __ffs(left & readable ? left & readable : left) - 1;
    const int taken = __shfl_sync(kFullWarp, kind, lead);
    PieceTile<kDim> tile{};
    tile.tokens = __ballot_sync(kFullWarp, kind == taken || kind < 0) & left;
    left &= ~tile.tokens;
    tile.scale = row.affine.scale, tile.offset = row.affine.offset, tile.dtype = p.dtype;
    if (taken < 0) {  // so no token has codes
      tile.fill(out);
      continue;
    }
    const uint8_t* const other = shuffle_pointer(row.codes, lead);
    tile.codes = kind == taken ? row.codes : other;
    tile.is_rotated = task.rows.rotation > 1;
    if (has_mean) {
      const __half* const mean = shuffle_pointer(row.mean, lead);
      tile.take_mean(mean, means[warp]);
    }
    const auto format = RowFormat(__shfl_sync(kFullWarp, int(row.format), lead));
    with_format(format, RowFormats{}, [&](auto type) { tile.template write<decltype(type)>(out); });
  }
}

}  // namespace

Status read_pieces(const PieceParams& params, Launch launch) {
  const CacheView& cache = params.cache;
  if (params.seqs.batch > 32767) return Status::unsupported("batch over 32767");
  if (cache.k.head_dim != cache.v.head_dim) {  // K's and V's blocks take as many tokens
    return Status::unsupported("keys and values of unlike head_dims");
  }
  // Of a kernel whose blocks take `count` tokens.
  const auto grid = [&](int count) {
    unsigned chunks = 0;
    for (int i = 0; i < params.count; ++i) chunks += ceil_div(params.pieces[i].tokens, count);
    return dim3(chunks, unsigned(cache.num_kv_heads), unsigned(params.seqs.batch * 2));
  };
  const dim3 tiles = grid(kTileWarps * kTileTokens);
  if (tiles.x == 0 || tiles.z == 0) return Status::ok();
  const auto is_whole = [&](const RowsView& rows) {
    return rows.rotation < 2 || rows.rotation == rows.head_dim;
  };
  const bool are_whole = is_whole(cache.k) && is_whole(cache.v);
  return launch_on(launch, [&](cudaStream_t stream) {
    if (are_whole && cache.k.head_dim == 64) {
      read_tiles<64><<<tiles, kTileThreads, 0, stream>>>(params);
    } else if (are_whole && cache.k.head_dim == 128) {
      read_tiles<128><<<tiles, kTileThreads, 0, stream>>>(params);
    } else if (are_whole && cache.k.head_dim == 256) {
      read_tiles<256><<<tiles, kTileThreads, 0, stream>>>(params);
    } else {
      const int lanes = cache.k.head_dim / kLaneChannels;
      read_rows<<<grid(kRows * kWarps * (32 / lanes)), kThreads, 0, stream>>>(params);
    }
  });
}

}  // namespace kvquant::cuda
