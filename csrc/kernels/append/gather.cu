// Gather: dequantizes the rows that attention sees, for whoever needs them as they are.
#include "common/age.h"
#include "common/paging.h"
#include "common/rows.h"
#include "formats/formats.cuh"
#include "kernels/device.cuh"

namespace kvquant::cuda {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * 32;

// grid: (chunks of rows, num_kv_heads, batch * 2): K and V are even and odd in z.
template <class Formats, class T>
__global__ void __launch_bounds__(kThreads) gather_kernel(const GatherParams p) {
  const CacheView& cache = p.cache;
  const bool is_key = blockIdx.z % 2 == 0;
  const int sequence = blockIdx.z / 2, head = blockIdx.y;
  const int dim = is_key ? cache.k.head_dim : cache.v.head_dim;
  const Rows& rows = is_key ? p.key : p.value;
  const RowLanes at(dim);
  const Paging paging(cache, p.seqs.max_blocks);
  const int token = (int(blockIdx.x) * kWarps + int(threadIdx.x / 32)) * at.rows + at.row;
  const bool mine = at.row >= 0 && token < p.seqs.max_seqlen_q;
  const int length = stored_tokens(cache, p.seqs, p.seqs.seq_lens[sequence]);
  const bool stored = mine && token >= first_token(p.seqs, sequence) && token < length;
  const Place from = stored ? place_of(cache, p.seqs, paging, sequence, token) : Place{-1, 0};
  float x[kLaneChannels] = {};
  if (from.block >= 0) {
    RowAffine affine;
    const auto load = [&](auto format, const CacheView& view, Place at_row) {
      using Format = decltype(format);
      const RowsView rows = is_key ? view.k : view.v;  // a reference would put the view in memory
      affine = Format::affine(
          rows_of<typename Format::Params>(rows.params, at_row.block, head)[at_row.row]);
      LaneCodes<Format>::load(rows_of<uint8_t>(rows.codes, at_row.block, head) +
                                  int64_t(at_row.row) * Format::code_bytes(dim),
                              at.channel(), x);
    };
    const int age = age_group(cache, p.seqs);
    if (age && (token < age || token >= open_start(age, length))) {
      load(Int8{}, young_view(cache, p.seqs), {sequence, young_row(age, token)});
    } else {
      with_rows(Formats{}, is_key, [&](auto format) { load(format, cache, from); });
    }
    float shift[kLaneChannels] = {};
    if (is_key && cache.mean_group) {
      const __half* const mean = mean_of<__half>(cache, p.seqs, paging, sequence, head, token);
      if (mean) load16(mean + at.channel(), shift);
    }
#pragma unroll
    for (int c = 0; c < kLaneChannels; ++c) {
      x[c] = fmaf(affine.scale, x[c], affine.offset) + shift[c];
    }
  }
  rotate(x, is_key ? cache.k.rotation : cache.v.rotation, at);
  if (!mine) return;
  store16(static_cast<T*>(rows.data) + sequence * rows.batch_stride + token * rows.token_stride +
              head * rows.head_stride + at.channel(),
          x, p.dtype);
}

}  // namespace

Status gather(const GatherParams& params, Launch launch) {
  const CacheView& cache = params.cache;
  const int dim = most(cache.k.head_dim, cache.v.head_dim);
  const int rows = kWarps * (32 / (dim / kLaneChannels));
  if (params.seqs.max_seqlen_q == 0 || params.seqs.batch == 0) return Status::ok();
  const dim3 grid(ceil_div(params.seqs.max_seqlen_q, rows), unsigned(cache.num_kv_heads),
                  unsigned(params.seqs.batch * 2));
  if (grid.z > 65535) return Status::unsupported("batch over 32767");
  return with_pair(cache.k.format, cache.v.format, [&](auto formats) {
    return launch_on(launch, [&](cudaStream_t stream) {
      dispatch_dtype(params.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        gather_kernel<decltype(formats), Sized<T>><<<grid, kThreads, 0, stream>>>(params);
      });
    });
  });
}

}  // namespace kvquant::cuda
