// The part of a score that the group's mean adds, once a group: query . mean.
#pragma once

#include "kernels/attention/query.cuh"

namespace kvquant::cuda {

constexpr int kMeanGroups = 8;  // whose means a warp multiplies at once

// Groups whose scores a block keeps at once.
template <class Traits>
constexpr int kGroups = Traits::kWarps * kMeanGroups;
// Those of young tokens come first, if there are any, and are the last warp's.
template <class Traits>
constexpr int kYoungGroups = Traits::kByAge ? kMeanGroups : 0;

// Tokens that a block may take between two turns of finding mean scores, whatever they begin at.
template <class Traits>
__device__ __forceinline__ int mean_scores_reach(const CacheView& cache) {
  if (!cache.mean_group) return 1 << 30;
  const int groups = kGroups<Traits> - kYoungGroups<Traits> - 2;
  return max(Traits::kStep,
             groups * min(cache.mean_group, 1 << 20) / Traits::kStep * Traits::kStep);
}

// The means of groups first + g, eight a warp, on their way: a lane's channels are those of its
// pieces of keys. The last warps have the first groups, since they may have no query row to
// prepare. Groups beyond `last`, and those whose block is lost, count as zero.
template <class Traits>
struct GroupMeans {
  using Keys = KeyTile<typename Traits::Key, Traits::kDim>;
  static constexpr int kPieces = Traits::kDim / 32;  // of a lane
  // Where registers hold tokens these go to shared memory, a lane's pieces to where it reads them:
  // what comes to registers is waited for together with the tokens that are asked for next.
  static constexpr bool kStaged = Traits::kHeld;
  using Stage = uint4[Traits::kWarps][kStaged ? kPieces : 1][32];

  Stage& stage;
  const int warp;
  bool any;  // of the warp's groups is wanted
  uint4 x[kPieces];

  __device__ __forceinline__ GroupMeans(Stage& stage, int warp) : stage(stage), warp(warp) {}

  __device__ __forceinline__ int first_of_warp() const {
    return (Traits::kWarps - 1 - warp) * kMeanGroups;
  }
  // first_block: where the sequence has one. The groups are first ... last, and young ones those of
  // tokens up to `young_end`, counted without the `hole` tokens behind the first group.
  __device__ __forceinline__ void ask(const AttentionCall& p, const RowTile& rows,
                                      const Paging& paging, int first_block, int first, int last,
                                      int young_end, int hole, int g, int t) {
    const bool is_young = Traits::kByAge && first_of_warp() == 0;
    first = is_young ? 0 : first + first_of_warp() - kYoungGroups<Traits>;
    if (is_young) last = (young_end - 1) >> paging.group_shift;
    any = first <= last;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) x[i] = {};
    if (any) {
      int index = first + g, block = -1;
      const bool is_wanted = index <= last;
      if (is_young && index > 0) index += hole >> paging.group_shift;
      if (p.cache.mean_group && is_wanted) {
        block = p.seqs.max_blocks == 1 ? first_block
                                       : block_of(p.cache, p.seqs, rows.sequence,
                                                  index << paging.group_shift >> paging.shift);
      }
      const __half* mean =
          rows_of<__half>(p.cache.mean, max(block, 0), rows.head) +
          int64_t((index << paging.group_shift & paging.mask) >> paging.group_shift) *
              p.cache.k.head_dim +
          Keys::channel(0, t);
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
        const int c = Keys::channel(i, t) - Keys::channel(0, t);
        const bool there = block >= 0 && Keys::channel(i, t) < p.cache.k.head_dim;
        if constexpr (kStaged) {
          uint4* const to = &stage[warp][i][threadIdx.x & 31];
          if (there) {
            copy_async<16>(to, mean + c);
          } else {
            *to = {};
          }
        } else if (there) {
          x[i] = load_keep(mean + c);
        }
      }
    }
    if (kStaged) close_copies();
  }
  __device__ __forceinline__ uint4 piece(int i) const {
    if constexpr (kStaged) return stage[warp][i][threadIdx.x & 31];
    return x[i];
  }

  // This warp's mean_scores[group - first][row].
  __device__ __forceinline__ void multiply(const Query<Traits>& query,
                                           float (*mean_scores)[Traits::kRows]) const {
    if (!any) return;
    if (kStaged) wait_copies<0>(0);
    // Two sums each: the tensor core's instructions need not wait for one another.
    float c[2][Traits::kFragments][4] = {};
#pragma unroll
    for (int step = 0; step < Traits::kDim / 32; ++step) {
      const uint4 mean = Keys::in_order(piece(step));
#pragma unroll
      for (int f = 0; f < Traits::kFragments; ++f) {
        uint4 a = query.fragment(f, step);  // signed bytes, to fp16
        a.x ^= 0x80808080u, a.y ^= 0x80808080u, a.z ^= 0x80808080u, a.w ^= 0x80808080u;
        mma_16816(c[0][f],
                  make_uint4(centered(codes_low(a.x)), centered(codes_low(a.y)),
                             centered(codes_high(a.x)), centered(codes_high(a.y))),
                  mean.x, mean.y);
        mma_16816(c[1][f],
                  make_uint4(centered(codes_low(a.z)), centered(codes_low(a.w)),
                             centered(codes_high(a.z)), centered(codes_high(a.w))),
                  mean.z, mean.w);
      }
    }
    float (*const mine)[Traits::kRows] = mean_scores + first_of_warp() + 2 * query.t;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int r = 0; r < Traits::kRowSets; ++r) {
        float dot = 0.f;
#pragma unroll
        for (int n = 0; n < Traits::kQueryLimbs; ++n) {
          const int set = n * Traits::kRowSets + r;  // of eight rows
          const int at = set % 2 * 2 + i;
          dot = fmaf(256.f, dot, c[0][set / 2][at] + c[1][set / 2][at]);
        }
        mine[i][query.g + 8 * r] = dot;
      }
    }
  }
};

}  // namespace kvquant::cuda
