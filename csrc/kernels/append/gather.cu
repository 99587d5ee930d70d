// Gather: dequantises the rows that attention sees, for whoever needs them as they are.
#include "kernels/common/cache.cuh"
#include "kernels/common/device.cuh"
#include "kernels/common/row.cuh"

namespace kvquant::cuda {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * 32;

// grid: (chunks of rows, kv_heads, batch * 2): K and V are even and odd in z.
template <class T>
__global__ void __launch_bounds__(kThreads) gather_kernel(const GatherParams p) {
  const CacheView& cache = p.cache;
  const bool is_key = blockIdx.z % 2 == 0;
  const int sequence = blockIdx.z / 2, head = blockIdx.y;
  const int dim = is_key ? cache.k_dim : cache.v_dim;
  const Rows& rows = is_key ? p.key : p.value;
  const RowLanes at(dim);
  const Paging paging(cache, p.seqs.max_blocks);
  const int token = (int(blockIdx.x) * kWarps + int(threadIdx.x / 32)) * at.rows + at.row;
  const bool mine = at.row >= 0 && token < p.seqs.tokens;
  const bool stored = mine && token >= first_token(p.seqs, sequence) &&
                      token < stored_tokens(cache, p.seqs, p.seqs.seq_lens[sequence]);
  const int block = stored ? block_of(cache, p.seqs, sequence, token >> paging.shift) : -1;
  float x[kLaneChannels] = {};
  if (block >= 0) {
    const int64_t row = token & paging.mask;
    const float2 affine = __half22float2(
        rows_of<__half2>(is_key ? cache.k_params : cache.v_params, block, head)[row]);
    decode16(*reinterpret_cast<const uint4*>(
                 rows_of<uint8_t>(is_key ? cache.k_data : cache.v_data, block, head) + row * dim +
                 at.channel()),
             x);
    float shift[kLaneChannels] = {};
    if (is_key && cache.group) {
      const int start = token / cache.group * cache.group;
      const int home = block_of(cache, p.seqs, sequence, start >> paging.shift);
      if (home >= 0) {
        load16(rows_of<__half>(cache.k_mean, home, head) +
                   int64_t((start & paging.mask) / cache.group) * dim + at.channel(),
               shift);
      }
    }
#pragma unroll
    for (int c = 0; c < kLaneChannels; ++c) x[c] = fmaf(affine.x, x[c], affine.y) + shift[c];
  }
  rotate(x, is_key ? cache.k_rotation : cache.v_rotation, at);
  if (!mine) return;
  store16(static_cast<T*>(rows.data) + sequence * rows.batch_stride + token * rows.token_stride +
              head * rows.head_stride + at.channel(),
          x);
}

}  // namespace

Status gather(const GatherParams& params, Launch launch) {
  const int dim = params.cache.k_dim < params.cache.v_dim ? params.cache.v_dim : params.cache.k_dim;
  const int rows = kWarps * (32 / (dim / kLaneChannels));
  if (params.seqs.tokens == 0 || params.seqs.batch == 0) return Status::ok();
  const dim3 grid(ceil_div(params.seqs.tokens, rows), unsigned(params.cache.kv_heads),
                  unsigned(params.seqs.batch * 2));
  if (grid.z > 65535) return Status::unsupported("batch over 32767");
  return launch_on(launch, [&](cudaStream_t stream) {
    dispatch_dtype(params.dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      gather_kernel<T><<<grid, kThreads, 0, stream>>>(params);
    });
  });
}

}  // namespace kvquant::cuda
