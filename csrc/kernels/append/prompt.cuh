// Appends of many rows, at the memory's rate: what rows.cuh does, for 16-bit rows of 64, 128 or 256
// channels that lie at multiples of 16 bytes and go behind their sequence.
//
// A block takes one head's keys, or values, of one group (or of 256 tokens without a mean). Its
// rows come to shared memory, each once. The mean that a group's keys need is that of the group
// before: whose block sums its rows and leaves the mean in a box for the next one. Blocks start in
// order, so the one that is waited for runs, or has run.
//
// It is instructions that count: a lane has 32 channels of a row, in pieces of eight, so that what
// is done once a row (parameters, addresses) is shared by more of them, and a warp's accesses are
// whole sectors. A thread reads from shared memory what it has copied there: no barrier.
#pragma once

#include "kernels/append/rows.cuh"

namespace kvquant::cuda {

constexpr int kPieces = 4, kPiece = 8;           // of a lane; channels of one
constexpr int kPromptChannels = kPieces * kPiece;  // of a lane
constexpr int kPromptTokens = 256;               // of a block

// Lane `index` of a row has channels (piece * kLanes + index) * 8 ...
template <int kDim>
struct PromptLanes {
  static constexpr int kWarps = kDim / 16, kThreads = kWarps * 32;
  static constexpr int kLanes = kDim / kPromptChannels, kRows = 32 / kLanes;  // a row's; a warp's
  static constexpr int kSlots = kWarps * kRows, kSteps = kPromptTokens / kSlots;

  int lane, index, slot;
  unsigned row_mask;  // the row's lanes

  __device__ __forceinline__ PromptLanes() {
    lane = threadIdx.x % 32;
    index = lane % kLanes;
    slot = int(threadIdx.x) / kLanes;
    row_mask = ((1u << kLanes) - 1) << (lane - index);
  }
  // Of x[c], in which a lane has its channels.
  __device__ __forceinline__ int channel(int c) const {
    return (c / kPiece * kLanes + index) * kPiece + c % kPiece;
  }
  // All lanes of the warp must call, as below.
  __device__ __forceinline__ bool all(bool holds) const {
    return (__ballot_sync(kFullWarp, holds) & row_mask) == row_mask;
  }
  __device__ __forceinline__ float max(float x) const {
#pragma unroll
    for (int step = 1; step < kLanes; step *= 2) {
      x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, step));
    }
    return x;
  }
};

using PromptRow = float[kPromptChannels];

// In the order of steps that common/hadamard.h fixes. All lanes of the warp must call.
template <int kDim>
__device__ __forceinline__ void rotate(PromptRow& x, const PromptLanes<kDim>& at) {
  const auto butterflies = [&](int step) {
#pragma unroll
    for (int i = 0; i < kPromptChannels; ++i) {
      if (i & step) continue;
      const float sum = x[i] + x[i + step], difference = x[i] - x[i + step];
      x[i] = sum, x[i + step] = difference;
    }
  };
#pragma unroll
  for (int step = 1; step < kPiece; step *= 2) butterflies(step);
#pragma unroll
  for (int step = 1; step < PromptLanes<kDim>::kLanes; step *= 2) {
    const float sign = at.index & step ? -1.f : 1.f;
#pragma unroll
    for (int i = 0; i < kPromptChannels; ++i) {
      x[i] = fmaf(x[i], sign, __shfl_xor_sync(kFullWarp, x[i], step));
    }
  }
#pragma unroll
  for (int step = kPiece; step < kPromptChannels; step *= 2) butterflies(step);
  const float norm = hadamard_norm(kDim);
#pragma unroll
  for (int i = 0; i < kPromptChannels; ++i) x[i] = __fmul_rn(x[i], norm);
}

// Two neighbouring elements of 16 bits.
template <class T>
struct Pair;
template <>
struct Pair<__half> {
  using Type = __half2;
  static constexpr bool kIsHalf = true;
  static __device__ __forceinline__ float2 floats(uint32_t pair) { return half2_floats(pair); }
};
template <>
struct Pair<__nv_bfloat16> {
  using Type = __nv_bfloat162;
  static constexpr bool kIsHalf = false;
  static __device__ __forceinline__ float2 floats(uint32_t pair) {
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
  }
};
// The larger magnitudes of two pairs, a NaN prevails. Their signs mean nothing.
template <class T>
__device__ __forceinline__ uint32_t max_magnitudes(uint32_t a, uint32_t b) {
#if __CUDA_ARCH__ >= 860
  uint32_t most;
  if constexpr (Pair<T>::kIsHalf) {
    asm("max.NaN.xorsign.abs.f16x2 %0, %1, %2;" : "=r"(most) : "r"(a), "r"(b));
  } else {
    asm("max.NaN.xorsign.abs.bf16x2 %0, %1, %2;" : "=r"(most) : "r"(a), "r"(b));
  }
  return most;
#else
  a &= 0x7fff7fffu, b &= 0x7fff7fffu;
  typename Pair<T>::Type x, y;
  memcpy(&x, &a, 4), memcpy(&y, &b, 4);
  x = __hmax2_nan(x, y);
  memcpy(&a, &x, 4);
  return a;
#endif
}

// A lane's channels of a row as they come.
template <class T>
struct PromptWords {
  using T2 = typename Pair<T>::Type;
  uint4 words[kPieces];

  __device__ __forceinline__ uint32_t pair(int i) const {
    const uint4& word = words[i / 4];
    return i % 4 == 0 ? word.x : i % 4 == 1 ? word.y : i % 4 == 2 ? word.z : word.w;
  }
  __device__ __forceinline__ void read(PromptRow& x) const {
#pragma unroll
    for (int i = 0; i < kPromptChannels / 2; ++i) {
      const float2 y = Pair<T>::floats(pair(i));
      x[2 * i] = y.x, x[2 * i + 1] = y.y;
    }
  }
  // Whether all of the row is finite. All lanes of the warp must call, as below.
  template <int kDim>
  __device__ __forceinline__ bool is_finite(const PromptLanes<kDim>& at) const {
    uint32_t most = pair(0);
#pragma unroll
    for (int i = 1; i < kPromptChannels / 2; ++i) most = max_magnitudes<T>(most, pair(i));
    const float2 y = Pair<T>::floats(most);
    return at.all(fabsf(y.x) <= kMaxAbs && fabsf(y.y) <= kMaxAbs);
  }
  // Likewise, with its least and largest element.
  template <int kDim>
  __device__ __forceinline__ bool range(const PromptLanes<kDim>& at, float& low,
                                        float& high) const {
    const float2 least = reduce([](T2 a, T2 b) { return __hmin2_nan(a, b); });
    const float2 most = reduce([](T2 a, T2 b) { return __hmax2_nan(a, b); });
    low = -at.max(-fminf(least.x, least.y));
    high = at.max(fmaxf(most.x, most.y));
    return at.all(least.x >= -kMaxAbs && least.y >= -kMaxAbs && most.x <= kMaxAbs &&
                  most.y <= kMaxAbs);
  }

 private:
  template <class F>
  __device__ __forceinline__ float2 reduce(F&& step) const {
    T2 best;
#pragma unroll
    for (int i = 0; i < kPromptChannels / 2; ++i) {
      const uint32_t bits = pair(i);
      T2 x;
      memcpy(&x, &bits, 4);
      best = i ? step(best, x) : x;
    }
    return make_float2(to_float(best.x), to_float(best.y));
  }
};

// The rows of a block in shared memory.
template <class T, int kDim>
struct PromptStage {
  using Lanes = PromptLanes<kDim>;
  uint4 words[Lanes::kSteps][kPieces][Lanes::kThreads];

  // Asks for the rows of tokens [begin, end), a group of copies a step.
  template <class Format>
  __device__ __forceinline__ void ask(const Source<Format, T>& src, const Lanes& at, int begin,
                                      int end) {
    const T* row = src.row(begin + at.slot - src.length) + at.channel(0);
#pragma unroll
    for (int step = 0; step < Lanes::kSteps; ++step) {
      if (begin + at.slot + step * Lanes::kSlots < end) {
#pragma unroll
        for (int i = 0; i < kPieces; ++i) {
          copy_async<16>(&words[step][i][threadIdx.x], row + i * (Lanes::kLanes * kPiece));
        }
      }
      close_copies();
      row += Lanes::kSlots * src.rows.token_stride;
    }
  }
  // Calls body(step, token, row) for the rows that are this thread's, as they come. All lanes of a
  // warp call it as often; a token from `end` on has no row.
  template <class F>
  __device__ __forceinline__ void for_rows(const Lanes& at, int begin, int end, F&& body) const {
#pragma unroll 1
    for (int step = 0; begin + step * Lanes::kSlots < end; ++step) {
      wait_copies<Lanes::kSteps - 1>(Lanes::kSteps - 1 - step);
      PromptWords<T> row;
#pragma unroll
      for (int i = 0; i < kPieces; ++i) row.words[i] = words[step][i][threadIdx.x];
      body(step, begin + at.slot + step * Lanes::kSlots, row);
    }
  }
};

template <int kDim>
struct PromptScratch {
  using Lanes = PromptLanes<kDim>;
  float warps[Lanes::kWarps][kDim];  // sums of a warp's rows
  int counts[Lanes::kWarps];         // of the rows that are summed
  float incoming[kDim], stored[kDim];
  float own[kDim];   // mean of the group's own rows
  float mean[kDim];  // that the group's keys have, as it is stored
  bool given;        // it is that of the group before
};

// The sum of a lane's channels with those of the lanes that differ in the bits up to `kStep`: of
// the first 2 * kHalf a lane keeps kHalf at each bit. `first`: which.
template <int kStep, int kHalf, int kDim>
__device__ __forceinline__ void sum_lanes(PromptRow& x, int& first, const PromptLanes<kDim>& at) {
  if constexpr (kStep >= PromptLanes<kDim>::kLanes) {
    const bool upper = at.lane & kStep;
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const float other = upper ? x[i] : x[i + kHalf];
      x[i] = (upper ? x[i + kHalf] : x[i]) + __shfl_xor_sync(kFullWarp, other, kStep);
    }
    first += upper ? kHalf : 0;
    sum_lanes<kStep / 2, kHalf / 2>(x, first, at);
  }
}

// Sums the warp's rows, of which each has `count` summands, into the scratch.
template <int kDim>
__device__ __forceinline__ void sum_rows(PromptRow& x, int count, const PromptLanes<kDim>& at,
                                         PromptScratch<kDim>& scratch) {
  using Lanes = PromptLanes<kDim>;
  int first = 0;
  sum_lanes<16, kPromptChannels / 2>(x, first, at);
  const int warp = threadIdx.x / 32;
#pragma unroll
  for (int i = 0; i < Lanes::kLanes; ++i) scratch.warps[warp][at.channel(first + i)] = x[i];
#pragma unroll
  for (int step = 16; step >= Lanes::kLanes; step /= 2) {
    count += __shfl_xor_sync(kFullWarp, count, step);
  }
  if (at.lane == 0) scratch.counts[warp] = count;
}

// The sums of the block's rows from those of its warps. All threads must call.
template <int kDim>
__device__ __forceinline__ int sum_warps(const PromptScratch<kDim>& scratch, float* to) {
  using Lanes = PromptLanes<kDim>;
  __syncthreads();
  if (threadIdx.x < kDim) {
    float sum = 0.f;
#pragma unroll
    for (int w = 0; w < Lanes::kWarps; ++w) sum += scratch.warps[w][threadIdx.x];
    to[threadIdx.x] = sum;
  }
  int count = 0;
#pragma unroll
  for (int w = 0; w < Lanes::kWarps; ++w) count += scratch.counts[w];
  __syncthreads();
  return count;
}

// Of sums of `count` rows, the incoming ones of which are not rotated yet: their mean as it is
// stored. A warp calls.
template <int kDim>
__device__ __forceinline__ void take_mean(const PromptLanes<kDim>& at, bool rotated,
                                          const float* incoming, const float* stored, int count,
                                          float* mean) {
  PromptRow x;
#pragma unroll
  for (int i = 0; i < kPromptChannels; ++i) x[i] = incoming ? incoming[at.channel(i)] : 0.f;
  if (incoming && rotated) rotate(x, at);  // the sum of rotated rows is the rotated sum
  if (at.lane < PromptLanes<kDim>::kLanes) {
#pragma unroll
    for (int i = 0; i < kPromptChannels; ++i) {
      const float sum = x[i] + (stored ? stored[at.channel(i)] : 0.f);
      const float of = count ? __fdiv_rn(sum, float(count)) : 0.f;
      mean[at.channel(i)] = __half2float(__float2half_rn(fminf(fmaxf(of, -kMaxAbs), kMaxAbs)));
    }
  }
  __syncwarp();
}

// Where a block leaves a group's mean for the block of the next group, which leaves the box as it
// was. There are fewer boxes than groups: before one is used again, whoever takes what it has runs.
template <int kDim>
struct MeanBox {
  static constexpr int kBoxes = kAppendFloats / kDim;
  static constexpr uint32_t kNone = 0x7f800000u;  // instead of a mean: the group has no usable row
  float* box;

  __device__ __forceinline__ MeanBox(float* boxes, int64_t number)
      : box(boxes + number % kBoxes * kDim) {}

  // A warp calls these. Whoever never comes, since a program changes lengths while they are read,
  // is waited for some seconds.
  static constexpr int kMostLooks = 1 << 22;
  __device__ __forceinline__ void wait_until_free(int lane) const {
    look(lane, [](uint32_t word) { return word == kNothing; }, [](int, const float*) {});
  }
  __device__ __forceinline__ void leave(int lane, const float* mean, bool any) const {
    for (int c = lane * 4; c < kDim; c += 128) {
      float x[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] = any ? mean[c + i] : __uint_as_float(kNone);
      leave_floats<4>(box + c, x);
    }
  }
  // Whether there was one.
  __device__ __forceinline__ bool take(int lane, float* mean) const {
    bool any = true;
    look(
        lane, [](uint32_t word) { return word != kNothing; },
        [&](int c, const float* x) {
          const float nothing = __uint_as_float(kNothing);
          const float nothings[4] = {nothing, nothing, nothing, nothing};
          leave_floats<4>(box + c, nothings);
          any = __float_as_uint(x[0]) != kNone;
#pragma unroll
          for (int i = 0; i < 4; ++i) mean[c + i] = x[i];
        });
    return __all_sync(kFullWarp, any);
  }

 private:
  template <class Until, class F>
  __device__ __forceinline__ void look(int lane, Until&& until, F&& then) const {
    for (int c = lane * 4; c < kDim; c += 128) {
      float x[4];
      for (int looks = kMostLooks; looks; --looks) {
        look_at_floats<4>(box + c, x);
        bool all = true;
#pragma unroll
        for (int i = 0; i < 4; ++i) all = all && until(__float_as_uint(x[i]));
        if (all) break;
      }
      then(c, x);
    }
  }
};

// Which piece of work a block has: a chunk of a sequence.
struct PromptItem {
  int sequence, index;
  bool has_next;  // the item after it is the sequence's next chunk
};
// Items there are: of packed rows, as many as they may need however they lie in their chunks.
inline int64_t prompt_items(const AppendParams& p) {
  const int chunk = chunk_tokens(p.cache);
  if (!p.seqs.cu_seqlens_q) return int64_t(p.seqs.batch) * chunks_of(p.cache, p.seqs.max_seqlen_q);
  return p.seqs.total_q / chunk + int64_t(2) * p.seqs.batch;
}
__device__ __forceinline__ PromptItem prompt_item(const AppendParams& p, int item) {
  if (!p.seqs.cu_seqlens_q) {
    const int chunks = chunks_of(p.cache, p.seqs.max_seqlen_q), sequence = item / chunks;
    return {sequence, item - sequence * chunks, item + 1 < (sequence + 1) * chunks};
  }
  // The last sequence whose first item is not behind: whatever the offsets are, items from there on
  // have the same answer.
  const int chunk = chunk_tokens(p.cache), shift = log2_of(chunk);
  int mine = -1, first = 0, next = -1;
  for (int b = threadIdx.x % 32; b < p.seqs.batch; b += 32) {
    const int begin = (min(max(p.seqs.cu_seqlens_q[b], 0), p.seqs.total_q) >> shift) + 2 * b;
    if (begin <= item) mine = b, first = begin;
    if (begin <= item + 1) next = b;
  }
  int sequence = mine;
#pragma unroll
  for (int step = 16; step; step /= 2) {
    sequence = max(sequence, __shfl_xor_sync(kFullWarp, sequence, step));
    next = max(next, __shfl_xor_sync(kFullWarp, next, step));
  }
  if (sequence < 0) return {-1, 0, false};
  return {sequence, item - __shfl_sync(kFullWarp, first, sequence % 32), next == sequence};
}

// What a block of keys has to do with means.
struct MeanTask {
  bool opens;   // the group begins in this call
  bool comes;   // and the group before has rows in this call: its block leaves the mean
  bool leaves;  // the next group's block waits for one
  bool adds;    // stored rows count: those of the group before, or of this one

  __device__ __forceinline__ MeanTask(const Chunk& chunk, int length, int count, int group,
                                      bool has_next)
      : opens(chunk.start >= length),
        comes(chunk.start > length),
        leaves(has_next && length + count > chunk.start + group),
        adds(opens ? !comes && chunk.start > 0 : leaves) {}
};

// Sums the stored rows of a task that adds some to scratch.stored; returns how many. `rows`: in
// shared memory, before it has the block's rows.
template <class Format, class T, int kDim>
__device__ __forceinline__ int sum_old(const Source<Format, T>& src, const Chunk& chunk,
                                       const MeanTask& task, MeanScratch& rows,
                                       PromptScratch<kDim>& scratch) {
  using Lanes = PromptLanes<kDim>;
  const int begin = task.opens ? chunk.start - src.cache.mean_group : chunk.start;
  const int end = task.opens ? chunk.start : src.length;
  sum_stored<Format>({src, max(begin, first_token(src.seqs, src.sequence)), end}, rows,
                     Lanes::kWarps);
  const int slots = RowSlot(kDim, 0, kStoredWarps).slots;
  const int count = sum_slots<Lanes::kThreads>(rows, slots, kDim, scratch.stored);
  __syncthreads();
  return count;
}

// The mean of the chunk's keys, into scratch.mean and, where the group begins in this call, to the
// cache; and what the next group's block waits for. old: what sum_old returned. Returns which
// steps' rows of this thread are finite.
template <class Format, class T, int kDim>
__device__ __forceinline__ uint32_t find_means(const Source<Format, T>& src,
                                               const PromptLanes<kDim>& at, const Chunk& chunk,
                                               const MeanTask& task, int old,
                                               const PromptStage<T, kDim>& stage,
                                               PromptScratch<kDim>& scratch,
                                               const MeanBox<kDim>& box,
                                               const MeanBox<kDim>& next_box) {
  const int warp = threadIdx.x / 32, first = first_token(src.seqs, src.sequence);
  const bool rotated = src.rotation() > 1;
  if (task.leaves && warp == 0) next_box.wait_until_free(at.lane);
  uint32_t finite = 0;
  {
    PromptRow sum = {};
    int count = 0;
    stage.for_rows(at, chunk.begin, chunk.end, [&](int step, int token, const auto& row) {
      const bool ok = row.is_finite(at);
      finite |= uint32_t(ok) << step;
      const bool counts = ok && token < chunk.end && token >= first && src.stored(token).block >= 0;
      if (!counts) return;
      PromptRow x;
      row.read(x);
      ++count;
#pragma unroll
      for (int i = 0; i < kPromptChannels; ++i) sum[i] += x[i];
    });
    sum_rows(sum, count, at, scratch);
  }
  const int own = sum_warps(scratch, scratch.incoming);
  if (warp == 0 && (task.leaves || task.opens)) {
    const bool with_old = task.adds && !task.opens;
    const int total = with_old ? own + old : own;
    take_mean(at, rotated, scratch.incoming, with_old ? scratch.stored : nullptr, total,
              scratch.own);
    if (task.leaves) next_box.leave(at.lane, scratch.own, total > 0);
  }
  if (warp == 1 && task.opens) {
    bool given = false;
    if (task.comes) {
      given = box.take(at.lane, scratch.mean);
    } else if (old > 0) {
      take_mean<kDim>(at, rotated, nullptr, scratch.stored, old, scratch.mean);
      given = true;
    }
    if (at.lane == 0) scratch.given = given;
  }
  __syncthreads();
  __half* const slot = src.mean(chunk.start);
  if (threadIdx.x < kDim) {
    float& mean = scratch.mean[threadIdx.x];
    if (task.opens) {
      if (!scratch.given) mean = own >= kMinMeanRows ? scratch.own[threadIdx.x] : 0.f;
      if (slot) slot[threadIdx.x] = __float2half_rn(mean);
    } else if (slot) {
      mean = __half2float(slot[threadIdx.x]);
    }
    if (!slot) mean = 0.f;
  }
  __syncthreads();
  return finite;
}

// As write_rows of rows.cuh. mean: of the group, as floats; null: none. finite: which steps' rows
// are, where there is a mean.
template <class Format, class T, int kDim>
__device__ __forceinline__ void write_rows(const Source<Format, T>& src,
                                           const PromptLanes<kDim>& at,
                                           const PromptStage<T, kDim>& stage, int begin, int end,
                                           const float* mean, uint32_t finite_steps) {
  const bool rotated = src.rotation() > 1;
  stage.for_rows(at, begin, end, [&](int step, int token, const PromptWords<T>& row) {
    const Place to = token < end ? src.stored(token) : Place{-1, 0};
    PromptRow x;
    row.read(x);
    float low = INFINITY, high = -INFINITY;
    bool finite;
    if (rotated || mean) {
      if (rotated) rotate(x, at);
      if (mean) {
#pragma unroll
        for (int i = 0; i < kPromptChannels; i += 4) {
          const float4 y = *reinterpret_cast<const float4*>(mean + at.channel(i));
          x[i] = __fsub_rn(x[i], y.x), x[i + 1] = __fsub_rn(x[i + 1], y.y);
          x[i + 2] = __fsub_rn(x[i + 2], y.z), x[i + 3] = __fsub_rn(x[i + 3], y.w);
        }
      }
#pragma unroll
      for (int i = 0; i < kPromptChannels; ++i) low = fminf(low, x[i]), high = fmaxf(high, x[i]);
      low = -at.max(-low);
      high = at.max(high);
      finite = mean ? finite_steps >> step & 1 : row.is_finite(at);
    } else {
      finite = row.range(at, low, high);
    }
    const auto params = Format::params(low, high, finite);
    const Encoder<Format> encoder(params);
    const bool fits = to.block < 0 || (finite && low >= -kMaxAbs && high <= kMaxAbs);
    const bool all_fit = kCodesFit<Format> && __all_sync(kFullWarp, fits);
    if (to.block < 0) return;
    uint8_t* const codes = src.codes(to);
    if (all_fit) {
#pragma unroll
      for (int i = 0; i < kPromptChannels; i += kPiece) {
        LaneCodes<Format>::template store<kPiece>(
            codes, at.channel(i), [&](int c) { return encoder.code_that_fits(x[i + c]); });
      }
    } else {
#pragma unroll
      for (int i = 0; i < kPromptChannels; i += kPiece) {
        LaneCodes<Format>::template store<kPiece>(codes, at.channel(i),
                                                  [&](int c) { return encoder.code(x[i + c]); });
      }
    }
    if (at.index == 0) *src.params(to) = params;
  });
}

}  // namespace kvquant::cuda
