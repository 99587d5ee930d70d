// Append: rotate, subtract the group's mean, quantize and scatter K and V in one launch.
//
// A block takes one head's rows of one group (or of 256 tokens without a mean), K or V. Where the
// group begins in this call, the block first takes its mean: of the incoming rows of the group
// before (rotated once, as a sum) and of those that are stored. So no block waits for another.
// The rows are read twice for that; the second read comes from L2.
#include "kernels/append/ages.cuh"
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

// What a block appends from: of a grid (.., kv_heads, batch * 2), where K and V are even and odd in
// z. age: of the young rows, whose view is `cache`.
template <class Format, class T>
__device__ __forceinline__ Source<Format, T> source_of(const AppendParams& p,
                                                       const CacheView& cache, int age = 0) {
  const bool is_key = blockIdx.z % 2 == 0;
  const int sequence = blockIdx.z / 2;
  return {cache,
          p.seqs,
          p.slot_mapping,
          is_key ? p.key : p.value,
          is_key,
          sequence,
          int(blockIdx.y),
          call_rows(p.seqs, sequence),
          p.seqs.seq_lens ? checked_length(p.seqs.seq_lens[sequence]) : 0,
          Paging(cache, p.seqs.max_blocks),
          only_block(p, sequence),
          age};
}

// grid: (chunks, kv_heads, batch * 2).
template <class Formats, class T>
__global__ void __launch_bounds__(kThreads, 4) append_kernel(const AppendParams p) {
  __shared__ MeanScratch scratch;
  __shared__ float mean[256];
  with_rows(Formats{}, blockIdx.z % 2 == 0, [&](auto format) {
    const auto src = source_of<decltype(format), T>(p, p.cache);
    const Chunk chunk = chunk_of(p.cache, src.length, src.call.count, int(blockIdx.x));
    if (chunk.begin >= chunk.end) return;
    const __half* const own = find_mean<kThreads>(src, chunk.start, chunk.end, scratch, mean);
    write_rows(src, chunk.begin, chunk.end, own, threadIdx.x / 32);
  });
  if (p.advance) advance_lengths(p);
}

// By age, in two launches, since new rows take the place of those that are closed. The first one
// takes the mean of the group behind the open one, and closes this, where the call begins that.
// grid: (kCloseShares, kv_heads, batch * 2).
constexpr int kCloseShares = 4;

template <class Formats, class T>
__global__ void __launch_bounds__(kThreads, 4) close_kernel(const AppendParams p) {
  __shared__ MeanScratch scratch;
  __shared__ ClosingRows closing[kRowWarps];
  __shared__ float mean[256];
  const CacheView slabs = young_view(p.cache, p.seqs);
  const auto young = source_of<Int8, T>(p, slabs, chunk_tokens(p.cache));
  const Ages ages(p.cache, young.length, young.call.count);
  const int next = ages.was_open + ages.group, total = young.length + young.call.count;
  if (young.length == 0 || next >= total) return;
  if (blockIdx.x == 0) {
    find_mean<kThreads>(young, next, min(next + ages.group, total), scratch, mean);
  }
  with_rows(Formats{}, young.is_key, [&](auto format) {
    const auto old = source_of<decltype(format), T>(p, p.cache);
    close_share(young, old, ages, blockIdx.x, kCloseShares, closing, kRowWarps);
  });
}

// The second one writes the new rows. grid: as append_kernel's.
template <class Formats, class T>
__global__ void __launch_bounds__(kThreads, 4) append_aged_kernel(const AppendParams p) {
  __shared__ MeanScratch scratch;
  __shared__ float mean[256];
  const CacheView slabs = young_view(p.cache, p.seqs);
  const auto young = source_of<Int8, T>(p, slabs, chunk_tokens(p.cache));
  const Chunk chunk = chunk_of(p.cache, young.length, young.call.count, int(blockIdx.x));
  if (chunk.begin < chunk.end) {
    const Ages ages(p.cache, young.length, young.call.count);
    const bool is_taken = young.length > 0 && chunk.start == ages.was_open + ages.group;
    const __half* own = nullptr;
    if (!is_taken) {
      own = find_mean<kThreads>(young, chunk.start, chunk.end, scratch, mean);
    } else if (young.is_key && p.cache.mean_group) {
      own = young.mean(chunk.start);
    }
    const auto with_old = [&](auto&& f) {
      with_rows(Formats{}, young.is_key,
                [&](auto format) { f(source_of<decltype(format), T>(p, p.cache)); });
    };
    write_aged<false>(young, with_old, ages, chunk.start, chunk.begin, chunk.end, own,
                      threadIdx.x / 32);
  }
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
        using Formats = decltype(formats);
        if constexpr (can_age(Formats{})) {
          if (params.seqs.young.data) {
            const dim3 shares(kCloseShares, grid.y, grid.z);
            close_kernel<Formats, T><<<shares, kThreads, 0, stream>>>(params);
            append_aged_kernel<Formats, T><<<grid, kThreads, 0, stream>>>(params);
            return;
          }
        }
        append_kernel<Formats, T><<<grid, kThreads, 0, stream>>>(params);
      });
    });
  });
}

}  // namespace kvquant::cuda
