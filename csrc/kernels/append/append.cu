// Append: rotate, subtract the group's mean, quantize and scatter K and V in one launch.
//
// A block takes one head's rows of one group (or of 256 tokens without a mean), K or V. Where the
// group begins in this call, the block first takes its mean: of the incoming rows of the group
// before (rotated once, as a sum) and of those that are stored. So no block waits for another.
// The rows are read twice for that; the second read comes from L2.
#include "kernels/append/group_means.cuh"
#include "kernels/append/prompt.cuh"
#include "kernels/device.cuh"

namespace kvquant::cuda {
namespace {

constexpr int kThreads = kRowWarps * 32;

// grid: (chunks, kv_heads, batch * 2): K and V are even and odd in z.
template <class Formats, class T>
__global__ void __launch_bounds__(kThreads, 4) append_kernel(const AppendParams p) {
  __shared__ GroupScratch scratch;
  const bool is_key = blockIdx.z % 2 == 0;
  with_rows(Formats{}, is_key, [&](auto format) {
    const auto src =
        source_of<decltype(format), T>(p, p.cache, is_key, blockIdx.z / 2, int(blockIdx.y));
    const Chunk chunk = chunk_of(p.cache, src.length, src.call.count, int(blockIdx.x));
    if (chunk.begin >= chunk.end) return;
    const __half* const own = find_mean<kThreads>(src, chunk.start, chunk.end, scratch);
    write_rows(src, chunk.begin, chunk.end, own, threadIdx.x / 32);
  });
  if (p.advance) advance_lengths<kThreads>(p);
}

}  // namespace

Status append(const AppendParams& params, Launch launch) {
  const CacheView& cache = params.cache;
  if (params.seqs.max_seqlen_q == 0 || params.seqs.batch == 0) return Status::ok();
  const dim3 grid(unsigned(chunks_of(cache, params.seqs.max_seqlen_q)),
                  unsigned(cache.num_kv_heads), unsigned(params.seqs.batch * 2));
  if (grid.z > 65535) return Status::unsupported("batch over 32767");
  if (params.seqs.young.data) return append_aged(params, launch);
  const bool prompt = is_prompt(params);
  return with_pair(cache.k.format, cache.v.format, [&](auto formats) {
    using Formats = decltype(formats);
    return launch_on(launch, [&](cudaStream_t stream) {
      dispatch_dtype(params.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        if constexpr (sizeof(T) == 2) {
          if (prompt && launch_prompt<Formats, T>(params, launch, stream)) return;
        }
        append_kernel<Formats, Sized<T>><<<grid, kThreads, 0, stream>>>(params);
      });
    });
  });
}

}  // namespace kvquant::cuda
