// Append: rotate, subtract the group's mean, quantize and scatter K and V in one launch.
//
// A block takes one head's rows of one group (or of 256 tokens without a mean), K or V. Where the
// group begins in this call, the block first takes its mean: of the incoming rows of the group
// before (rotated once, as a sum) and of those that are stored. So no block waits for another.
// The rows are read twice for that; the second read comes from L2.
#include "kernels/append/prompt.cuh"
#include "kernels/device.cuh"

namespace kvquant::cuda {
namespace {

constexpr int kThreads = kRowWarps * 32;

// The last block to be done adds the call's tokens to the lengths, which all have read by then.
template <int kThreads>
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

// What a block appends from.
template <class Format, class T>
__device__ __forceinline__ Source<Format, T> source_of(const AppendParams& p, bool is_key,
                                                       int sequence, int head) {
  return {p.cache,
          p.seqs,
          p.slot_mapping,
          is_key ? p.key : p.value,
          is_key,
          sequence,
          head,
          call_rows(p.seqs, sequence),
          p.seqs.seq_lens ? checked_length(p.seqs.seq_lens[sequence]) : 0,
          Paging(p.cache, p.seqs.max_blocks),
          only_block(p, sequence)};
}

// grid: (chunks, kv_heads, batch * 2): K and V are even and odd in z.
template <class Formats, class T>
__global__ void __launch_bounds__(kThreads, 4) append_kernel(const AppendParams p) {
  __shared__ GroupScratch scratch;
  const bool is_key = blockIdx.z % 2 == 0;
  with_rows(Formats{}, is_key, [&](auto format) {
    const auto src = source_of<decltype(format), T>(p, is_key, blockIdx.z / 2, int(blockIdx.y));
    const Chunk chunk = chunk_of(p.cache, src.length, src.call.count, int(blockIdx.x));
    if (chunk.begin >= chunk.end) return;
    const __half* const own = find_mean<kThreads>(src, chunk.start, chunk.end, scratch);
    write_rows(src, chunk.begin, chunk.end, own, threadIdx.x / 32);
  });
  if (p.advance) advance_lengths<kThreads>(p);
}

template <class T, int kDim>
struct PromptShared {
  union {
    PromptStage<T, kDim> stage;
    MeanScratch rows;
  };
  PromptScratch<kDim> scratch;
};

template <bool kIsKey, class Format, class T, int kDim>
__device__ __forceinline__ void append_chunk(const AppendParams& p, PromptShared<T, kDim>& shared,
                                             int item, int head) {
  const PromptItem of = prompt_item(p, item);
  if (of.sequence < 0) return;
  const auto src = source_of<Format, T>(p, kIsKey, of.sequence, head);
  const Chunk chunk = chunk_of(p.cache, src.length, src.call.count, of.index);
  if (chunk.begin >= chunk.end) return;
  const PromptLanes<kDim> at;
  const bool has_mean = kIsKey && p.cache.mean_group;
  const MeanTask task(chunk, src.length, src.call.count, p.cache.mean_group, of.has_next);
  int old = 0;
  if (has_mean && task.adds) old = sum_old(src, chunk, task, shared.rows, shared.scratch);
  shared.stage.ask(src, at, chunk.begin, chunk.end);
  const float* mean = nullptr;
  uint32_t finite = 0;
  if (has_mean) {
    const int64_t number = int64_t(item) * p.cache.num_kv_heads + head;
    const MeanBox<kDim> box(p.partial, number), next(p.partial, number + p.cache.num_kv_heads);
    finite = find_means(src, at, chunk, task, old, shared.stage, shared.scratch, box, next);
    mean = shared.scratch.mean;
  }
  write_rows(src, at, shared.stage, chunk.begin, chunk.end, mean, finite);
}

// grid: heads of K and of V of each item, one item after the other.
template <class Formats, class T, int kDim>
__global__ void __launch_bounds__(PromptLanes<kDim>::kThreads, kDim == 64    ? 6
                                                               : kDim == 128 ? 3
                                                                             : 1)
    append_prompt_kernel(const __grid_constant__ AppendParams p) {
  extern __shared__ __align__(16) unsigned char memory[];
  auto& shared = *reinterpret_cast<PromptShared<T, kDim>*>(memory);
  const int heads = p.cache.num_kv_heads, part = int(blockIdx.x) / heads;
  const int head = int(blockIdx.x) - part * heads;
  if (part % 2 == 0) {
    append_chunk<true, typename Formats::Key, T, kDim>(p, shared, part / 2, head);
  } else {
    append_chunk<false, typename Formats::Value, T, kDim>(p, shared, part / 2, head);
  }
  if (p.advance) advance_lengths<PromptLanes<kDim>::kThreads>(p);
}

// Whether all rows lie at multiples of 16 bytes.
bool is_aligned(const Rows& rows, Dtype dtype) {
  const int64_t size = dtype == Dtype::kFloat32 ? 4 : 2;
  const auto at = reinterpret_cast<uintptr_t>(rows.data);
  return (at | (rows.batch_stride | rows.token_stride | rows.head_stride) * size) % 16 == 0;
}

bool is_prompt(const AppendParams& p) {
  const CacheView& cache = p.cache;
  const int dim = cache.k.head_dim;
  const bool of_dim = cache.v.head_dim == dim && (dim == 64 || dim == 128 || dim == 256);
  return append_floats(p.seqs.max_seqlen_q) && p.partial && !p.slot_mapping && of_dim &&
         p.dtype != Dtype::kFloat32 && chunk_tokens(cache) <= kPromptTokens &&
         cache.num_kv_heads <= kAppendFloats / dim / 4 &&
         prompt_items(p) * 2 * cache.num_kv_heads <= INT32_MAX && is_aligned(p.key, p.dtype) &&
         is_aligned(p.value, p.dtype);
}

// False, and nothing done, on a device whose blocks have too little shared memory.
template <class Formats, class T, int kDim>
bool launch_prompt(const AppendParams& p, Launch launch, cudaStream_t stream) {
  constexpr int kBytes = sizeof(PromptShared<T, kDim>);
  const auto kernel = append_prompt_kernel<Formats, T, kDim>;
  int most = 0;
  cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, launch.device);
  if (most < kBytes) return false;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  const auto blocks = unsigned(prompt_items(p) * 2 * p.cache.num_kv_heads);
  kernel<<<blocks, PromptLanes<kDim>::kThreads, kBytes, stream>>>(p);
  return true;
}

template <class Formats, class T>
bool launch_prompt(const AppendParams& p, Launch launch, cudaStream_t stream) {
  switch (p.cache.k.head_dim) {
    case 64:
      return launch_prompt<Formats, T, 64>(p, launch, stream);
    case 128:
      return launch_prompt<Formats, T, 128>(p, launch, stream);
    default:
      return launch_prompt<Formats, T, 256>(p, launch, stream);
  }
}

}  // namespace

Status append(const AppendParams& params, Launch launch) {
  const CacheView& cache = params.cache;
  if (params.seqs.max_seqlen_q == 0 || params.seqs.batch == 0) return Status::ok();
  const dim3 grid(unsigned(chunks_of(cache, params.seqs.max_seqlen_q)),
                  unsigned(cache.num_kv_heads), unsigned(params.seqs.batch * 2));
  if (grid.z > 65535) return Status::unsupported("batch over 32767");
  const bool prompt = is_prompt(params);
  return with_pair(cache.k.format, cache.v.format, [&](auto formats) {
    using Formats = decltype(formats);
    return launch_on(launch, [&](cudaStream_t stream) {
      dispatch_dtype(params.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        if constexpr (sizeof(T) == 2) {
          if (prompt && launch_prompt<Formats, T>(params, launch, stream)) return;
        }
        append_kernel<Formats, T><<<grid, kThreads, 0, stream>>>(params);
      });
    });
  });
}

}  // namespace kvquant::cuda
