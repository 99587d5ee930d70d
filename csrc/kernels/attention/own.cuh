// A decode step's own rows, which its attention appends: they are quantised while stored ones are
// on their way, go to the cache, and take the place of what has been read there.
#pragma once

#include "kernels/append/rows.cuh"
#include "kernels/attention/query.cuh"

namespace kvquant::cuda {

// The call's own keys or values, of this block's head, behind `stored` tokens.
template <class Traits>
__device__ __forceinline__ Source<typename Traits::Element> own_source(const AttentionCall& p,
                                                                       bool is_key, int stored,
                                                                       int whole = -1) {
  const int sequence = blockIdx.z, head = blockIdx.y;
  return {p.cache, p.seqs,
          nullptr, is_key ? p.key : p.value,
          is_key,  sequence,
          head,    call_rows(p.seqs, sequence),
          stored,  Paging(p.cache, p.seqs.max_blocks),
          whole};
}

// Own tokens of a block as they are in the cache.
template <class Traits>
struct OwnRows {
  static constexpr int kMost = Traits::kRows;  // each has a query row at least
  int begin, end;                              // tokens
  alignas(16) uint8_t keys[kMost][Traits::kDim];
  alignas(16) uint8_t values[kMost][Traits::kDim];
  uint32_t params[2][kMost];  // of keys, of values
};

// This warp's own rows, one at a time, as WarpRow says: the keys and values of one token after the
// other by warps in turn, from the last ones on, which may have no query row to prepare, but first
// by those that have no means to multiply either.
template <class Traits>
class OwnInFlight {
  using Element = typename Traits::Element;
  using Row = WarpRow<Traits::kDim>;

 public:
  // Asks for the first row of tokens [begin, end), which are of one group.
  __device__ __forceinline__ OwnInFlight(const AttentionCall& p, int stored, int whole, int begin,
                                         int end)
      : p_(p), stored_(stored), whole_(whole), begin_(begin), count_(end - begin) {
    if (turn() < 2 * count_) ask(turn());
  }
  // Stores the rows in the cache and in `own`.
  __device__ __forceinline__ void store(OwnRows<Traits>& own) {
    for (int item = turn(); item < 2 * count_; item += Traits::kWarps) {
      if (item != turn()) ask(item);
      const bool is_key = item % 2 == 0;
      const auto src = source(is_key);
      float x[1][Row::kCount];
      bool finite = true;
#pragma unroll
      for (int i = 0; i < Row::kCount; ++i) {
        x[0][i] = to_float(row_[i]);
        finite = finite && fabsf(x[0][i]) <= int8::kMaxAbs;
      }
      finite = __all_sync(kFullWarp, finite);
      if (src.rotation() > 1) rotate_warp<Traits::kDim>(x, src.rotation());
      float low = INFINITY, high = -INFINITY;
      Row::pieces([&](auto width, int i, int c) {
#pragma unroll
        for (int j = i; j < i + width(); ++j) {
          if (is_key && p_.cache.group) x[0][j] = __fsub_rn(x[0][j], __half2float(mean_[j]));
          if (Traits::kUsual || c < src.dim())
            low = fminf(low, x[0][j]), high = fmaxf(high, x[0][j]);
        }
      });
      const int8::RowParams affine = int8::row_params(-warp_max(-low), warp_max(high), finite);
      const float offset = int8::half_to_float(affine.offset);
      const float inverse = __fdiv_rn(1.f, int8::half_to_float(affine.scale));
      const int i = item / 2;
      const int2 to = src.stored(begin_ + i);
      uint8_t* const kept = is_key ? own.keys[i] : own.values[i];
      uint8_t* const cached =
          rows_of<uint8_t>(src.data(), max(to.x, 0), src.head) + int64_t(to.y) * src.dim();
      Row::pieces([&](auto width, int k, int c) {
        if (!Traits::kUsual && c >= src.dim()) return;
        alignas(4) uint8_t codes[width()];
#pragma unroll
        for (int j = 0; j < width(); ++j) {
          const float y = __fmul_rn(__fsub_rn(x[0][k + j], offset), inverse);
          codes[j] = uint8_t(round_code(y, 0.f, 255.f));
        }
        store_bytes<width()>(kept + c, codes);
        if (to.x >= 0) store_bytes<width()>(cached + c, codes);
      });
      if (threadIdx.x % 32 == 0) {
        const uint32_t params = uint32_t(affine.scale) | uint32_t(affine.offset) << 16;
        own.params[!is_key][i] = params;
        if (to.x >= 0) rows_of<uint32_t>(src.params(), to.x, src.head)[to.y] = params;
      }
    }
  }

 private:
  const AttentionCall& p_;
  int stored_, whole_, begin_, count_;
  alignas(16) Element row_[Row::kCount];
  alignas(16) __half mean_[Row::kCount];

  static __device__ __forceinline__ int turn() {
    return (2 * Traits::kWarps - 3 - threadIdx.x / 32) % Traits::kWarps;
  }
  __device__ __forceinline__ Source<Element> source(bool is_key) const {
    return own_source<Traits>(p_, is_key, stored_, whole_);
  }
  __device__ __forceinline__ void ask(int item) {
    const bool is_key = item % 2 == 0;
    const auto src = source(is_key);
    const Element* const row = src.row(begin_ + item / 2 - stored_);
    Row::pieces([&](auto width, int i, int c) {
      if constexpr (Traits::kUsual) {
        load_vector<width()>(row + c, row_ + i);
      } else {
#pragma unroll
        for (int j = 0; j < width(); ++j) {
          row_[i + j] = c < src.dim() ? row[c + j] : from_float<Element>(0.f);
        }
      }
    });
    if (!is_key || !p_.cache.group) return;
    const __half* const mean = mean_slot(src, begin_ & -p_.cache.group);
    Row::pieces([&](auto width, int i, int c) {
      if (mean && (Traits::kUsual || c < src.dim())) {
        load_vector<width()>(mean + c, mean_ + i);
      } else {
#pragma unroll
        for (int j = i; j < i + width(); ++j) mean_[j] = __float2half(0.f);
      }
    });
  }
};

struct GroupScratch {
  MeanScratch rows;
  float mean[256];
};

// Appends tokens [from, to) of the call's own, among which a group begins. Afterwards all threads
// of the block find them in the cache.
template <class Traits>
__device__ __noinline__ void append_groups(const AttentionCall& p, GroupScratch& scratch,
                                           int stored, int from, int to) {
  const auto key = own_source<Traits>(p, true, stored);
  const auto value = own_source<Traits>(p, false, stored);
  const int group = p.cache.group ? p.cache.group : 1 << 30;
  for (int start = from & -group; start < to; start += group) {
    const int end = min(start + group, stored + key.call.count);
    const __half* mean = find_mean<Traits::kThreads>(key, start, end, scratch.rows, scratch.mean);
    write_rows<kRowWarps>(key, max(start, from), min(end, to), mean, threadIdx.x / 32);
    write_rows<kRowWarps>(value, max(start, from), min(end, to), nullptr, threadIdx.x / 32);
  }
  __syncthreads();
}

}  // namespace kvquant::cuda
