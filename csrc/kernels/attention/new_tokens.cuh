// A decode step's new tokens, which its attention appends: they are quantized while stored ones are
// on their way, go to the cache, and take the place of what has been read there.
#pragma once

#include "kernels/append/ages.cuh"
#include "kernels/append/group_means.cuh"
#include "kernels/attention/query.cuh"

namespace kvquant::cuda {

// The call's own keys or values, of this block's head, behind `stored` tokens. cache: of the call,
// or its young rows', with their age.
template <class Format, class Element>
__device__ __forceinline__ Source<Format, Element> new_source(const AttentionCall& p,
                                                              const CacheView& cache, bool is_key,
                                                              int stored, int whole = -1,
                                                              int age = 0) {
  const int sequence = blockIdx.y;
  return {cache,
          p.seqs,
          nullptr,
          is_key ? p.key : p.value,
          p.dtype,
          is_key,
          sequence,
          int(blockIdx.x),
          call_rows(p.seqs, sequence),
          stored,
          Paging(cache, p.seqs.max_blocks),
          whole,
          age};
}

template <class Traits>
__device__ __forceinline__ int age_of(const CacheView& cache) {
  return Traits::kIsYoung ? chunk_tokens(cache) : 0;
}

// Rows as they are in the cache.
template <class Format, int kRows, int kDim>
struct NewRows {
  alignas(16) uint8_t codes[kRows][Format::code_bytes(kDim)];
  typename Format::Params params[kRows];
};
// New tokens of a block.
template <class Traits>
struct NewTokens {
  static constexpr int kMost = Traits::kRows;  // each has a query row at least
  int begin, end;                              // tokens
  NewRows<typename Traits::Key, kMost, Traits::kDim> keys;
  NewRows<typename Traits::Value, kMost, Traits::kDim> values;
  // A row of each warp as it comes, and the mean of its group.
  alignas(16) typename Traits::Element incoming[Traits::kWarps][Traits::kDim];
  alignas(16) __half means[Traits::kWarps][Traits::kDim];
};

// This warp's new rows, one at a time, as WarpRow says: the keys and values of one token after the
// other by warps in turn, from the last ones on, which may have no query row to prepare, but first
// by those that have no means to multiply either.
template <class Traits>
class NewTokensInFlight {
  using Key = typename Traits::Key;
  using Value = typename Traits::Value;
  using Element = typename Traits::Element;
  using Row = WarpRow<Traits::kDim>;

 public:
  // Asks for this warp's first row, before it is known which tokens are the block's, of `tokens`.
  __device__ __forceinline__ NewTokensInFlight(const AttentionCall& p, const CacheView& cache,
                                               NewTokens<Traits>& new_tokens, int tokens, int warp)
      : p_(p),
        cache_(cache),
        new_tokens_(new_tokens),
        warp_(warp),
        any_(p.key.data && turn() < 2 * tokens) {
    if (any_) ask_row(turn(), turn() / 2);
  }
  // Asks for the mean of the group that the call's first token belongs to, behind `stored` others
  // in the cache, before it is known whether the block has any.
  __device__ __forceinline__ void ask_mean(int stored, int whole) {
    stored_ = stored, whole_ = whole;
    if (any_ && turn() % 2 == 0) {
      const auto src = source<Key>(true);
      const bool has_mean =
          p_.cache.mean_group && (stored & (p_.cache.mean_group - 1));  // else it begins now
      const __half* const from = has_mean ? src.mean(stored) : nullptr;
      Row::pieces([&](auto width, int, int c) {
        if (from && (Traits::kPlainCall || c < src.dim())) {
          copy_async<width() * sizeof(__half)>(mean() + c, from + c);
        } else {
#pragma unroll
          for (int j = c; j < c + width(); ++j) mean()[j] = __float2half(0.f);
        }
      });
    }
    close_copies();
  }
  // The block's are [begin, end), of that group.
  __device__ __forceinline__ void begin(int begin, int end) {
    begin_ = begin, count_ = end - begin;
  }
  // Quantizes the rows: `new_tokens` has them after a barrier. This warp's first one of the call is
  // there; `later` groups of copies were asked for after the mean.
  __device__ __forceinline__ void quantize(int later) {
    for (int item = turn(); item < 2 * count_; item += Traits::kWarps) {
      if (item != turn() || begin_ > stored_) {
        ask_row(item, begin_ - stored_ + item / 2);
        close_copies();
        wait_copies<0>(0);
      }
      const bool is_key = item % 2 == 0, has_mean = is_key && p_.cache.mean_group;
      const int dim = is_key ? p_.cache.k.head_dim : p_.cache.v.head_dim;
      float x[1][Row::kCount];
      bool finite = true;
      Row::pieces([&](auto width, int i, int c) {
        const auto channels = at<width()>(incoming() + c);
#pragma unroll
        for (int j = 0; j < width(); ++j) {
          x[0][i + j] = to_float(channels[j], p_.dtype);
          finite = finite && fabsf(x[0][i + j]) <= kMaxAbs;
        }
      });
      finite = __all_sync(kFullWarp, finite);
      const int rotation = is_key ? p_.cache.k.rotation : p_.cache.v.rotation;
      if (rotation > 1)
        rotate_warp<Traits::kDim>(x, Traits::kPlainCall ? Traits::kRotation : rotation);
      wait_copies<kMaxStages>(later);  // for the mean
      float low = INFINITY, high = -INFINITY;
      Row::pieces([&](auto width, int i, int c) {
        if (!Traits::kPlainCall && c >= dim) return;
        const auto of_mean = at<width()>(mean() + c);
#pragma unroll
        for (int j = 0; j < width(); ++j) {
          float& y = x[0][i + j];
          if (has_mean) y = __fsub_rn(y, __half2float(of_mean[j]));
          low = fminf(low, y), high = fmaxf(high, y);
        }
      });
      low = -warp_max(-low), high = warp_max(high);
      for_item(item, [&](auto format, auto& rows) {
        using Format = decltype(format);
        const auto params = Format::params(low, high, finite);
        const Encoder<Format> encoder(params);
        Row::pieces([&](auto width, int i, int c) {
          LaneCodes<Format>::template store<width()>(
              rows.codes[item / 2], c, [&](int j) { return encoder.code(x[0][i + j]); });
        });
        if (threadIdx.x % 32 == 0) rows.params[item / 2] = params;
      });
    }
  }
  // Writes what this warp has quantized to the cache: not what the barrier waits for.
  __device__ __forceinline__ void write() const {
    for (int item = turn(); item < 2 * count_; item += Traits::kWarps) {
      for_item(item, [&](auto format, const auto& rows) {
        using Format = decltype(format);
        const auto src = source<Format>(item % 2 == 0);
        const Place to = src.stored(begin_ + item / 2);
        if (to.block < 0) return;
        uint8_t* const cached = src.codes(to);
        Row::pieces([&](auto width, int, int c) {
          if (!Traits::kPlainCall && c >= src.dim()) return;
          constexpr int kBytes = Format::code_bytes(width());
          const int first = Format::code_bytes(c);
          store_vector<kBytes>(cached + first, at<kBytes>(rows.codes[item / 2] + first).x);
        });
        if (threadIdx.x % 32 == 0) *src.params(to) = rows.params[item / 2];
        if constexpr (Traits::kIsYoung) write_old(rows, item);
      });
    }
  }

 private:
  const AttentionCall& p_;
  const CacheView& cache_;
  NewTokens<Traits>& new_tokens_;
  const int warp_;
  const bool any_;  // of the call's rows may be this warp's
  int stored_ = 0, whole_ = -1, begin_ = 0, count_ = 0;

  __device__ __forceinline__ Element* incoming() const { return new_tokens_.incoming[warp_]; }
  __device__ __forceinline__ __half* mean() const { return new_tokens_.means[warp_]; }
  // Calls f with the format of an item, keys or values, and the rows that it is one of.
  template <class F>
  __device__ __forceinline__ void for_item(int item, F&& f) const {
    if constexpr (std::is_same_v<Key, Value>) {
      f(Key{}, item % 2 == 0 ? new_tokens_.keys : new_tokens_.values);
    } else if (item % 2 == 0) {
      f(Key{}, new_tokens_.keys);
    } else {
      f(Value{}, new_tokens_.values);
    }
  }
  template <int kCount, class T>
  struct Neighbours {
    alignas(kCount * sizeof(T)) T x[kCount];
    __device__ __forceinline__ T operator[](int i) const { return x[i]; }
  };
  template <int kCount, class T>
  static __device__ __forceinline__ Neighbours<kCount, T> at(const T* p) {
    return *reinterpret_cast<const Neighbours<kCount, T>*>(p);
  }

  // By age: an item's row once more, as it will be read when it is old.
  template <class Rows>
  __device__ __forceinline__ void write_old(const Rows& rows, int item) const {
    const int i = item / 2, token = begin_ + i;
    if (token < chunk_tokens(p_.cache)) return;
    with_rows(typename Traits::Pair{}, item % 2 == 0, [&](auto format) {
      using Format = decltype(format);
      const auto old = new_source<Format, Element>(p_, p_.cache, item % 2 == 0, stored_, whole_);
      const auto is_channel = [&](int c) { return Traits::kPlainCall || c < old.dim(); };
      const Place to = old.stored(token);
      if (to.block < 0) return;
      uint8_t* const codes = old.codes(to);
      if constexpr (std::is_same_v<Format, Int8>) {
        Row::pieces([&](auto width, int, int c) {
          if (is_channel(c)) store_vector<width()>(codes + c, at<width()>(rows.codes[i] + c).x);
        });
        if (threadIdx.x % 32 == 0) *old.params(to) = rows.params[i];
      } else {
        float low = INFINITY, high = -INFINITY;
        const auto code = [&](int c) { return float(rows.codes[i][c]); };
        Row::pieces([&](auto width, int, int c) {
          if (!is_channel(c)) return;
#pragma unroll
          for (int j = c; j < c + width(); ++j)
            low = fminf(low, code(j)), high = fmaxf(high, code(j));
        });
        const Narrowing<Format> narrowing(rows.params[i], -warp_max(-low), warp_max(high));
        Row::pieces([&](auto width, int, int c) {
          if (!is_channel(c)) return;
          LaneCodes<Format>::template store<width()>(
              codes, c, [&](int j) { return narrowing.code(code(c + j)); });
        });
        if (threadIdx.x % 32 == 0) *old.params(to) = narrowing.params;
      }
    });
  }
  __device__ __forceinline__ int turn() const {
    return (2 * Traits::kWarps - 3 - warp_) % Traits::kWarps;
  }
  template <class Format>
  __device__ __forceinline__ Source<Format, Element> source(bool is_key) const {
    return new_source<Format, Element>(p_, cache_, is_key, stored_, whole_, age_of<Traits>(cache_));
  }
  // Of the call's row i.
  __device__ __forceinline__ void ask_row(int item, int i) {
    const auto src = source<Key>(item % 2 == 0);  // the caller's rows: of no format yet
    const Element* const row = src.row(i);
    Row::pieces([&](auto width, int i, int c) {
      if constexpr (Traits::kPlainCall) {
        copy_async<width() * sizeof(Element)>(incoming() + c, row + c);
      } else {
#pragma unroll
        for (int j = c; j < c + width(); ++j) {
          incoming()[j] = c < src.dim() ? row[j] : Element{};
        }
      }
    });
  }
};

// Takes the mean of the group that the call's first token begins, behind `stored` others: that of
// the group before, to the cache and to where the warps look for it. False, and nothing done, if
// that group has no rows to take it of. `cache`: where new rows go. `whole`: the sequence's one
// block, where it is known.
template <class Traits>
__device__ __forceinline__ bool open_group(const AttentionCall& p, const CacheView& cache,
                                           GroupScratch& scratch, NewTokens<Traits>& new_tokens,
                                           int stored, int whole) {
  const auto key = new_source<typename Traits::Key, typename Traits::Element>(
      p, cache, true, stored, whole, age_of<Traits>(cache));
  const int begin = max(stored - cache.mean_group, first_token(p.seqs, key.sequence));
  if (begin >= stored) return false;
  const int found = sum_of_stored<Traits::kThreads>(key, begin, stored, scratch.rows, scratch.mean);
  if (found == 0) return false;
  __half* const slot = key.mean(stored);
  for (int c = threadIdx.x; c < key.dim(); c += Traits::kThreads) {
    const __half mean = slot ? stored_mean(scratch.mean[c] / float(found)) : __half(0.f);
    if (slot) slot[c] = mean;
#pragma unroll
    for (int w = 0; w < Traits::kWarps; ++w) new_tokens.means[w][c] = mean;
  }
  __syncthreads();
  return true;
}

// What instances share, which is all but the shape of their warps. The assembler makes a copy for
// each instance, so the code is short.
//
// Appends tokens [from, to) of the call's own, among which a group begins. Afterwards all threads
// of the block find them in the cache.
template <class Formats, class Element, int kThreads>
__device__ __noinline__ void append_groups(const AttentionCall& p, GroupScratch& scratch,
                                           int stored, int from, int to) {
  const int group = p.cache.mean_group ? p.cache.mean_group : 1 << 30;
#pragma unroll 1
  for (int i = 0; i < 2; ++i) {
    const bool is_key = i == 0;
    const auto src = new_source<typename Formats::Key, Element>(p, p.cache, is_key, stored);
#pragma unroll 1
    for (int start = from & -group; start < to; start += group) {
      const int begin = max(start, from), end = min(start + group, stored + src.call.count);
      const GroupMean mean{find_mean<kThreads>(src, start, end, scratch)};
      for_ready_rows(src, begin, min(end, to), mean, threadIdx.x / 32, kRowWarps,
                     [&](const RowSlot& at, const auto& row, const auto& x, bool finite) {
                       with_rows(Formats{}, is_key, [&](auto format) {
                         using Format = decltype(format);
                         store_row(new_source<Format, Element>(p, p.cache, is_key, stored), at,
                                   row.to, x, finite);
                       });
                     });
    }
  }
  __syncthreads();
}

// By age: likewise, where the call begins a group. Its rows are few: the ring keeps all of them.
template <class Formats, class Element, int kThreads>
__device__ __noinline__ void append_aged(const AttentionCall& p, GroupScratch& scratch, int stored,
                                         int from, int to) {
  const Ages ages(p.cache, stored, call_rows(p.seqs, blockIdx.y).count);
  const CacheView slabs = young_view(p.cache, p.seqs);
  const int warp = threadIdx.x / 32;
#pragma unroll 1
  for (int i = 0; i < 2; ++i) {
    const bool is_key = i == 0;
    const auto with_old = [&](auto&& f) {
      with_rows(Formats{}, is_key, [&](auto format) {
        f(new_source<decltype(format), Element>(p, p.cache, is_key, stored));
      });
    };
    const auto young = new_source<Int8, Element>(p, slabs, is_key, stored, -1, ages.group);
    open_groups<kThreads>(young, from, to, scratch);
    write_aged(young, with_old, ages, true, from, to, warp, kRowWarps);
  }
  __syncthreads();
}

}  // namespace kvquant::cuda
