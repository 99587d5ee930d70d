// Appends of many rows, at the memory's rate: what rows.cuh does, for rows as prompt_rows.cuh
// takes.
//
// A block takes one head's keys, or values, of one group (or of 256 tokens without a mean). Its
// rows come to shared memory, each once. The mean that a group's keys need is that of the group
// before: whose block sums its rows and leaves the mean in a box for the next one. Blocks start in
// order, so the one that is waited for runs, or has run.
#pragma once

#include "kernels/append/call.cuh"
#include "kernels/append/prompt_means.cuh"
#include "kernels/device.cuh"

namespace kvquant::cuda {

// Which piece of work a block has: a chunk of a sequence.
struct PromptItem {
  int sequence, index;
  bool has_next;  // the item after it is the sequence's next chunk
};
// Items there are: of packed rows, as many as they may need however they lie in their chunks.
inline int64_t prompt_items(const AppendParams& p) {
  const int chunk = chunk_tokens(p.cache);
  if (!p.seqs.cu_seqlens_q) return int64_t(p.seqs.batch) * chunks_of(p.cache, p.seqs.max_seqlen_q);
  return p.seqs.total_q / chunk + int64_t(2) * p.seqs.batch;
}
__device__ __forceinline__ PromptItem prompt_item(const AppendParams& p, int item) {
  if (!p.seqs.cu_seqlens_q) {
    const int chunks = chunks_of(p.cache, p.seqs.max_seqlen_q), sequence = item / chunks;
    return {sequence, item - sequence * chunks, item + 1 < (sequence + 1) * chunks};
  }
  // The last sequence whose first item is not behind: whatever the offsets are, items from there on
  // have the same answer.
  const int chunk = chunk_tokens(p.cache), shift = log2_of(chunk);
  int mine = -1, first = 0, next = -1;
  for (int b = threadIdx.x % 32; b < p.seqs.batch; b += 32) {
    const int begin = (min(max(p.seqs.cu_seqlens_q[b], 0), p.seqs.total_q) >> shift) + 2 * b;
    if (begin <= item) mine = b, first = begin;
    if (begin <= item + 1) next = b;
  }
  int sequence = mine;
#pragma unroll
  for (int step = 16; step; step /= 2) {
    sequence = max(sequence, __shfl_xor_sync(kFullWarp, sequence, step));
    next = max(next, __shfl_xor_sync(kFullWarp, next, step));
  }
  if (sequence < 0) return {-1, 0, false};
  return {sequence, item - __shfl_sync(kFullWarp, first, sequence % 32), next == sequence};
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

// grid: heads of K of each item, one item after the other, then those of V: blocks of V, of which
// none waits for another, fill the end.
template <class Formats, class T, int kDim>
__global__ void __launch_bounds__(PromptLanes<kDim>::kThreads, kDim == 64    ? 6
                                                               : kDim == 128 ? 3
                                                                             : 1)
    append_prompt_kernel(const __grid_constant__ AppendParams p) {
  extern __shared__ __align__(16) unsigned char memory[];
  auto& shared = *reinterpret_cast<PromptShared<T, kDim>*>(memory);
  const int heads = p.cache.num_kv_heads, items = int(gridDim.x) / heads / 2;
  const int part = int(blockIdx.x) / heads, head = int(blockIdx.x) - part * heads;
  if (part < items) {
    append_chunk<true, typename Formats::Key, T, kDim>(p, shared, part, head);
  } else {
    append_chunk<false, typename Formats::Value, T, kDim>(p, shared, part - items, head);
  }
  if (p.advance) advance_lengths<PromptLanes<kDim>::kThreads>(p);
}

// Whether all rows lie at multiples of 16 bytes.
inline bool is_aligned(const Rows& rows, Dtype dtype) {
  const int64_t size = dtype == Dtype::kFloat32 ? 4 : 2;
  const auto at = reinterpret_cast<uintptr_t>(rows.data);
  return (at | (rows.batch_stride | rows.token_stride | rows.head_stride) * size) % 16 == 0;
}

inline bool is_prompt(const AppendParams& p) {
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

}  // namespace kvquant::cuda
