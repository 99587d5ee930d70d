// Dequantizes a piece of every sequence's history for dense attention kernels, in the basis of the
// caller's rows. It is bound by memory: a byte an element is read, two are written.
#include "common/age.h"
#include "common/paging.h"
#include "formats/formats.cuh"
#include "kernels/device.cuh"

namespace kvquant::cuda {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * 32;
constexpr int kRows = 2;  // of a thread, on their way at once

// Two neighbouring lanes have 64 bytes of a row: each access of a warp writes whole sectors.
template <class T>
__device__ __forceinline__ void store_pairs(T* row, const float (&x)[kLaneChannels],
                                            const RowLanes& at, bool mine) {
  if constexpr (sizeof(T) == 4) {
    if (mine) store16(row + at.channel(), x);
  } else {
    if (at.lanes % 2) {
      if (mine) store16(row + at.channel(), x);
      return;
    }
    uint4 words[2];
    T part[kLaneChannels];
#pragma unroll
    for (int c = 0; c < kLaneChannels; ++c) part[c] = from_float<T>(x[c]);
    memcpy(words, part, sizeof(words));
    const bool odd = at.index % 2;
    uint4 give = odd ? words[0] : words[1];
    give.x = __shfl_xor_sync(kFullWarp, give.x, 1), give.y = __shfl_xor_sync(kFullWarp, give.y, 1);
    give.z = __shfl_xor_sync(kFullWarp, give.z, 1), give.w = __shfl_xor_sync(kFullWarp, give.w, 1);
    if (!mine) return;
    // The even lane's 32 bytes, then the odd one's; each lane writes its half of both.
    uint4* const to = reinterpret_cast<uint4*>(row + (at.channel() & ~31)) + odd;
    to[0] = odd ? give : words[0];
    to[2] = odd ? words[1] : give;
  }
}

// grid: (chunks of tokens, num_kv_heads, batch * 2): K and V are even and odd in z.
template <class Formats, bool kByAge, class T>
__global__ void __launch_bounds__(kThreads, 3) read_kernel(const PieceParams p) {
  const CacheView& cache = p.cache;
  const bool is_key = blockIdx.z % 2 == 0;
  const int sequence = blockIdx.z / 2, head = blockIdx.y;
  const RowsView& own = is_key ? cache.k : cache.v;
  const RowLanes at(own.head_dim);
  const Paging paging(cache, p.seqs.max_blocks);
  const int first = (int(blockIdx.x) * kRows * kWarps + int(threadIdx.x / 32)) * at.rows + at.row;
  T* const out = static_cast<T*>(is_key ? p.key : p.value) +
                 (int64_t(sequence) * cache.num_kv_heads + head) * p.tokens * own.head_dim;
  with_rows(Formats{}, is_key, [&](auto format) {
    using Format = decltype(format);
    using KeyParams = typename Formats::Key::Params;
    using ValueParams = typename Formats::Value::Params;
    float x[kRows][kLaneChannels];
    RowAffine affine[kRows];
    const __half* mean[kRows];
    bool usable[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int i = first + r * kWarps * at.rows;
      const bool mine = at.row >= 0 && i < p.tokens;
      const int token = p.first + (p.backwards ? p.tokens - 1 - i : i);
      const bool stored = mine && token >= p.low && token < p.high;
      const Place from = stored ? place_of(cache, p.seqs, paging, sequence, token) : Place{-1, 0};
      usable[r] = from.block >= 0;
      mean[r] = nullptr;
      affine[r] = {0.f, 0.f};
#pragma unroll
      for (int c = 0; c < kLaneChannels; ++c) x[r][c] = 0.f;
      if (!usable[r]) continue;
      RowAffine key, value;
      const int age = kByAge ? chunk_tokens(cache) : 0;
      if (kByAge && (token < age || token >= p.young_from)) {
        const Young young(cache, p.seqs, sequence, head, p.young_from);
        const int row = young.row(token);
        LaneCodes<Int8>::load(young.codes(is_key, row), at.channel(), x[r]);
        const auto affine_of = [&](bool of_key) {
          return Int8::affine(*reinterpret_cast<Int8::Params*>(young.params(of_key, row)));
        };
        key = affine_of(true), value = affine_of(false);
      } else {
        LaneCodes<Format>::load(rows_of<uint8_t>(own.codes, from.block, head) +
                                    int64_t(from.row) * Format::code_bytes(own.head_dim),
                                at.channel(), x[r]);
        key = Formats::Key::affine(rows_of<KeyParams>(cache.k.params, from.block, head)[from.row]);
        value = Formats::Value::affine(
            rows_of<ValueParams>(cache.v.params, from.block, head)[from.row]);
      }
      affine[r] = is_key ? key : value;
      usable[r] = !isnan(key.scale) && !isnan(value.scale);
      if (is_key && cache.mean_group) {
        mean[r] = mean_of<__half>(cache, p.seqs, paging, sequence, head, token);
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float shift[kLaneChannels] = {};
      if (mean[r]) load16(mean[r] + at.channel(), shift);
#pragma unroll
      for (int c = 0; c < kLaneChannels; ++c) {
        x[r][c] = fmaf(affine[r].scale, x[r][c], affine[r].offset) + shift[c];
      }
      rotate(x[r], own.rotation, at);
      const float odd = is_key ? NAN : 0.f;
#pragma unroll
      for (int c = 0; c < kLaneChannels; ++c) {  // rounding must not lead to an infinity
        x[r][c] = usable[r] ? fminf(fmaxf(x[r][c], -kMaxAbs), kMaxAbs) : odd;
      }
      const int i = first + r * kWarps * at.rows;
      store_pairs(out + int64_t(i) * own.head_dim, x[r], at, at.row >= 0 && i < p.tokens);
    }
  });
}

}  // namespace

Status read_piece(const PieceParams& params, Launch launch) {
  const CacheView& cache = params.cache;
  if (params.tokens == 0 || params.seqs.batch == 0) return Status::ok();
  const int dim = most(cache.k.head_dim, cache.v.head_dim);
  const int rows = kRows * kWarps * (32 / (dim / kLaneChannels));
  const dim3 grid(ceil_div(params.tokens, rows), unsigned(cache.num_kv_heads),
                  unsigned(params.seqs.batch * 2));
  if (grid.z > 65535) return Status::unsupported("batch over 32767");
  return with_pair(cache.k.format, cache.v.format, [&](auto formats) {
    return launch_on(launch, [&](cudaStream_t stream) {
      const auto start = [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        using Formats = decltype(formats);
        if constexpr (can_age(Formats{})) {
          if (params.seqs.young.data) {
            read_kernel<Formats, true, T><<<grid, kThreads, 0, stream>>>(params);
            return;
          }
        }
        read_kernel<Formats, false, T><<<grid, kThreads, 0, stream>>>(params);
      };
      if (params.dtype == Dtype::kFloat16) {
        start(static_cast<__half*>(nullptr));
      } else {
        start(static_cast<__nv_bfloat16*>(nullptr));
      }
    });
  });
}

}  // namespace kvquant::cuda
