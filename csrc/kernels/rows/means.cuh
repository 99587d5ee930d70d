// Products of a block's query with the means of its groups of keys, for many query rows.
#pragma once

#include "kernels/rows/tiles.cuh"

namespace kvquant::cuda {

// Products of a thread's rows with the means of eight groups, found by its warp.
template <class Traits>
class RowsMeans {
 public:
  // Of the group at `token`; all lanes must call. last: the last group of the split, `span`.
  __device__ __forceinline__ void of(const AttentionCall& p, const RowTile& rows,
                                     const Paging& paging, const RowsQuery<Traits>& query,
                                     int token, int last, const RowsSpan& span, int warp,
                                     float (&dot)[Traits::kThreadRows]) {
#pragma unroll
    for (float& x : dot) x = 0.f;
    if (!p.cache.mean_group) return;
    const int group = token >> paging.group_shift;
    if (group - first_ >= kMeanGroups) find(p, rows, paging, query, group, last, span, warp);
    const int at = group - first_, from = (threadIdx.x & 28) + at / 2;
#pragma unroll
    for (int r = 0; r < kThreadRows; ++r) {
      dot[r] = __shfl_sync(kFullWarp, at % 2 ? dots_[r][1] : dots_[r][0], from);
    }
  }

 private:
  static constexpr int kThreadRows = Traits::kThreadRows;
  float dots_[kThreadRows][2] = {};  // groups 2 t and 2 t + 1 of the eight
  int first_ = -kMeanGroups;         // of them

  // Groups whose block is lost count as zero.
  __device__ __forceinline__ void find(const AttentionCall& p, const RowTile& rows,
                                       const Paging& paging, const RowsQuery<Traits>& query,
                                       int first, int last, const RowsSpan& span, int warp) {
    constexpr int kSteps = Traits::kDim / 16;
    const int g = (threadIdx.x & 31) >> 2, t = threadIdx.x & 3;
    first_ = first;
    // A group that begins in the call has its mean from it.
    span.await((min(first + kMeanGroups - 1, last) << paging.group_shift) + 1);
    const __half* mean = nullptr;
    if (first + g <= last) {
      mean = mean_of<__half>(p.cache, p.seqs, paging, rows.sequence, rows.head,
                             (first + g) << paging.group_shift);
    }
    uint2 x[kSteps];
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      x[i] = mean ? load_keep<uint2>(mean + 16 * i + 4 * t) : make_uint2(0, 0);
    }
    float c[kThreadRows][4] = {};  // of each matrix of the query
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
#pragma unroll
      for (int m = 0; m < kThreadRows; ++m) {
        const int row = warp * 16 + g, channel = 16 * i + 4 * t;
        // Signed bytes, to fp16.
        const uint32_t a = query.get(m, row, channel) ^ 0x80808080u,
                       b = query.get(m, row + 8, channel) ^ 0x80808080u;
        mma_16816(c[m],
                  make_uint4(centered(codes_low(a)), centered(codes_low(b)),
                             centered(codes_high(a)), centered(codes_high(b))),
                  x[i].x, x[i].y);
      }
    }
#pragma unroll
    for (int i = 0; i < 2 * kThreadRows; ++i) {
      dots_[i / 2][i % 2] =
          fmaf(256.f, c[0][i], kThreadRows == 2 ? c[kThreadRows - 1][i] : c[0][2 + i]);
    }
  }
};

}  // namespace kvquant::cuda
