// Append: rotate, subtract the group's mean, quantize and scatter K and V in one launch.
//
// A block takes one head's rows of one group (or of 256 tokens without a mean), K or V; of a few
// tokens, all of them, K and V. Where the group begins in this call, the block first takes its
// mean: of the incoming rows of the group before (rotated once, as a sum) and of those that are
// stored. So no block waits for another. The rows are read twice for that; the second read comes
// from L2.
#include "kernels/append/group_means.cuh"
#include "kernels/append/prompt.cuh"
#include "kernels/device.cuh"

namespace kvquant::cuda {
namespace {

// grid: see BlockRows.
template <class Formats, class T>
__global__ void __launch_bounds__(kAppendThreads, 4)
    append_kernel(const __grid_constant__ AppendParams p) {
  __shared__ GroupScratch scratch;
  let_next_launch_start();
  const BlockRows block(p);
  if (block.begin < block.end) {
    const auto source = [&](auto format, bool is_key) {
      return source_of<decltype(format), T>(p, p.cache, is_key, block.sequence, block.head);
    };
    if (block.has_keys) {
      open_groups<kAppendThreads>(source(typename Formats::Key{}, true), block.begin, block.end,
                                  scratch);
    }
    with_rows(Formats{}, block.is_key, [&](auto format) {
      write_rows(source(format, block.is_key), block.begin, block.end, block.warp, block.warps);
    });
  }
  if (p.advance) advance_lengths<kAppendThreads>(p);
}

}  // namespace

Status append(const AppendParams& params, Launch launch) {
  const CacheView& cache = params.cache;
  if (params.seqs.max_seqlen_q == 0 || params.seqs.batch == 0) return Status::ok();
  const dim3 grid = BlockRows::grid(params);
  if (grid.z > 65535) {
    return Status::unsupported(BlockRows::are_few(params) ? "batch over 65535"
                                                          : "batch over 32767");
  }
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
        share_multiprocessors<append_kernel<Formats, Sized<T>>>(launch.device);
        append_kernel<Formats, Sized<T>><<<grid, kAppendThreads, 0, stream>>>(params);
      });
    });
  });
}

}  // namespace kvquant::cuda
