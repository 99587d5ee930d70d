// The means of an append of many rows: each block of keys sums its rows, and leaves their mean for
// the block that has the next group.
#pragma once

#include "kernels/append/group_means.cuh"
#include "kernels/append/prompt_rows.cuh"

namespace kvquant::cuda {

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
__device__ __forceinline__ uint32_t
find_means(const Source<Format, T>& src, const PromptLanes<kDim>& at, const Chunk& chunk,
           const MeanTask& task, int old, const PromptStage<T, kDim>& stage,
           PromptScratch<kDim>& scratch, const MeanBox<kDim>& box, const MeanBox<kDim>& next_box) {
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

}  // namespace kvquant::cuda
