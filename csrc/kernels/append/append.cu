// Append: rotate, subtract the group's mean, quantize and scatter K and V in one launch.
//
// A block takes one head's rows of one group (or of 256 tokens without a mean), K or V. Where the
// group begins in this call, the block first takes its mean: of the incoming rows of the group
// before (rotated once, as a sum) and of those that are stored. So no block waits for another.
// The rows are read twice for that; the second read comes from L2.
#include "kernels/append/rows.cuh"
#include "kernels/device.cuh"

namespace kvquant::cuda {
namespace {

constexpr int kThreads = kRowWarps * 32;

// The last block to be done adds the call's tokens to the lengths, which all have read by then.
__device__ void advance_lengths(const AppendParams& p) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    const int blocks = int(gridDim.x * gridDim.y * gridDim.z);
    last = atomicAdd(p.counter, 1) == blocks - 1;
    if (last) *p.counter = 0;
  }
  __syncthreads();
  if (!last) return;
  for (int b = threadIdx.x; b < p.seqs.batch; b += kThreads) {
    p.advance[b] += call_rows(p.seqs, b).count;
  }
}

__device__ int only_block(const AppendParams& p, int sequence) {
  const bool one = p.seqs.block_table && p.seqs.max_blocks == 1;
  return one ? block_of(p.cache, p.seqs, sequence, 0) : -1;
}

// grid: (chunks, kv_heads, batch * 2): K and V are even and odd in z.
template <class Formats, class T>
__global__ void __launch_bounds__(kThreads, 4) append_kernel(const AppendParams p) {
  __shared__ MeanScratch scratch;
  __shared__ float mean[256];
  const bool is_key = blockIdx.z % 2 == 0;
  const int sequence = blockIdx.z / 2;
  const CacheView& cache = p.cache;
  with_rows(Formats{}, is_key, [&](auto format) {
    const Source<decltype(format), T> src{
        cache,
        p.seqs,
        p.slot_mapping,
        is_key ? p.key : p.value,
        is_key,
        sequence,
        int(blockIdx.y),
        call_rows(p.seqs, sequence),
        p.seqs.seq_lens ? checked_length(p.seqs.seq_lens[sequence]) : 0,
        Paging(cache, p.seqs.max_blocks),
        only_block(p, sequence)};
    const Chunk chunk = chunk_of(cache, src.length, src.call.count, int(blockIdx.x));
    if (chunk.begin >= chunk.end) return;
    const __half* const own = find_mean<kThreads>(src, chunk.start, chunk.end, scratch, mean);
    write_rows(src, chunk.begin, chunk.end, own, threadIdx.x / 32);
  });
  if (p.advance) advance_lengths(p);
}

}  // namespace

Status append(const AppendParams& params, Launch launch) {
  const CacheView& cache = params.cache;
  if (params.seqs.max_seqlen_q == 0 || params.seqs.batch == 0) return Status::ok();
  const dim3 grid(unsigned(chunks_of(cache, params.seqs.max_seqlen_q)),
                  unsigned(cache.num_kv_heads), unsigned(params.seqs.batch * 2));
  if (grid.z > 65535) return Status::unsupported("batch over 32767");
  return with_pair(cache.k.format, cache.v.format, [&](auto formats) {
    return launch_on(launch, [&](cudaStream_t stream) {
      dispatch_dtype(params.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        append_kernel<decltype(formats), T><<<grid, kThreads, 0, stream>>>(params);
      });
    });
  });
}

}  // namespace kvquant::cuda
