// Append of rows by age: in two launches, since new rows take the place of those that are closed.
#include "kernels/append/ages.cuh"
#include "kernels/append/call.cuh"
#include "kernels/append/group_means.cuh"
#include "kernels/device.cuh"

namespace kvquant::cuda {
namespace {

constexpr int kThreads = kRowWarps * 32;
constexpr int kCloseShares = 4;  // blocks that share a group that closes

// The view of young rows, in shared memory: a thread's own would be in local memory, and written
// time and again. All threads must call.
__device__ __forceinline__ void share_young_view(const AppendParams& p, CacheView& slabs) {
  if (threadIdx.x == 0) slabs = young_view(p.cache, p.seqs);
  __syncthreads();
}

// The young rows of a block of a grid (.., kv_heads, batch * 2), where K and V are even and odd in
// z, and the same in the blocks of the view.
template <class Formats, class T>
struct Aged {
  const AppendParams& p;
  const bool is_key = blockIdx.z % 2 == 0;
  const Source<Int8, T> young;
  const Ages ages;

  __device__ __forceinline__ Aged(const AppendParams& p, const CacheView& slabs)
      : p(p),
        young(source<Int8>(slabs, chunk_tokens(p.cache))),
        ages(p.cache, young.length, young.call.count) {}

  template <class Format>
  __device__ __forceinline__ Source<Format, T> source(const CacheView& cache, int age = 0) const {
    return source_of<Format, T>(p, cache, is_key, blockIdx.z / 2, int(blockIdx.y), age);
  }
  // Calls f with the source of the old rows.
  template <class F>
  __device__ __forceinline__ void with_old(F&& f) const {
    with_rows(Formats{}, is_key, [&](auto format) { f(source<decltype(format)>(p.cache)); });
  }
  // Whether a group is the one behind that which was open: its mean is of stored rows.
  __device__ __forceinline__ bool is_next(int start) const {
    return young.length > 0 && start == ages.was_open + ages.group;
  }
};

// Takes the mean of the group behind the open one, and closes this, where the call begins that.
// grid: (kCloseShares, kv_heads, batch * 2).
template <class Formats, class T>
__global__ void __launch_bounds__(kThreads, 4)
    close_kernel(const __grid_constant__ AppendParams p) {
  __shared__ GroupScratch scratch;
  __shared__ ClosingRows closing[kRowWarps];
  __shared__ CacheView slabs;
  const int sequence = blockIdx.z / 2, length = checked_length(p.seqs.seq_lens[sequence]);
  const int total = length + call_rows(p.seqs, sequence).count;
  const int next = open_start(chunk_tokens(p.cache), length) + chunk_tokens(p.cache);
  if (length == 0 || next >= total) return;  // as most calls
  share_young_view(p, slabs);
  const Aged<Formats, T> aged(p, slabs);
  if (blockIdx.x == 0) {
    find_mean<kThreads>(aged.young, next, min(next + aged.ages.group, total), scratch);
  }
  aged.with_old([&](const auto& old) {
    close_share(aged.young, old, aged.ages, blockIdx.x, kCloseShares, closing, kRowWarps);
  });
}

// Writes the new rows. grid: (chunks, kv_heads, batch * 2).
template <class Formats, class T>
__global__ void __launch_bounds__(kThreads, 4)
    append_aged_kernel(const __grid_constant__ AppendParams p) {
  __shared__ GroupScratch scratch;
  __shared__ CacheView slabs;
  share_young_view(p, slabs);
  const Aged<Formats, T> aged(p, slabs);
  const auto& young = aged.young;
  const Chunk chunk = chunk_of(p.cache, young.length, young.call.count, int(blockIdx.x));
  if (chunk.begin < chunk.end) {
    const __half* mean = nullptr;
    if (!aged.is_next(chunk.start)) {
      mean = find_mean<kThreads>(young, chunk.start, chunk.end, scratch);
    } else if (young.is_key && p.cache.mean_group) {
      mean = young.mean(chunk.start);
    }
    const auto with_old = [&](auto&& f) { aged.with_old(f); };
    write_aged<false>(young, with_old, aged.ages, chunk.start, chunk.begin, chunk.end, mean,
                      threadIdx.x / 32);
  }
  if (p.advance) advance_lengths<kThreads>(p);
}

}  // namespace

Status append_aged(const AppendParams& params, Launch launch) {
  const CacheView& cache = params.cache;
  const dim3 chunks(unsigned(chunks_of(cache, params.seqs.max_seqlen_q)),
                    unsigned(cache.num_kv_heads), unsigned(params.seqs.batch * 2));
  const dim3 shares(kCloseShares, chunks.y, chunks.z);
  return with_pair(cache.k.format, cache.v.format, [&](auto formats) {
    using Formats = decltype(formats);
    if constexpr (can_age(Formats{})) {
      return launch_on(launch, [&](cudaStream_t stream) {
        dispatch_dtype(params.dtype, [&](auto* type) {
          using T = Sized<std::remove_pointer_t<decltype(type)>>;
          close_kernel<Formats, T><<<shares, kThreads, 0, stream>>>(params);
          append_aged_kernel<Formats, T><<<chunks, kThreads, 0, stream>>>(params);
        });
      });
    } else {
      return Status::unsupported("8-bit rows have no age");
    }
  });
}

}  // namespace kvquant::cuda
