// Append: rotate, subtract the group's mean, quantise and scatter K and V in one launch.
//
// A block takes one head's rows of one group (or of 256 tokens without a mean), K or V. Where the
// group begins in this call, the block first takes its mean: of the incoming rows of the group
// before (rotated once, as a sum) and of those that are stored. So no block waits for another.
// The rows are read twice for that; the second read comes from L2.
#include "formats/int8.h"
#include "kernels/common/cache.cuh"
#include "kernels/common/device.cuh"
#include "kernels/common/row.cuh"

namespace kvquant::cuda {
namespace {

constexpr int kWarps = 4, kThreads = kWarps * 32;
constexpr int kChunk = 256;  // tokens of a block where the format has no mean

// One head of one sequence, K or V.
template <class T>
struct Source {
  const AppendParams& p;
  const Rows& rows;
  const Slab &data, &params;
  int dim, rotation;
  int sequence, head;
  CallRows call;
  int length;  // tokens stored before the call
  Paging paging;

  __device__ const T* row(int i) const {
    return static_cast<const T*>(rows.data) + row_offset(rows, p.seqs, call, sequence, i) +
           head * rows.head_stride;
  }
  // (block, row) of an incoming row, block -1 where it has no place.
  __device__ int2 place(int i) const {
    if (p.slot_mapping) {
      const int64_t slot = p.slot_mapping[call.first + i];
      const int64_t block = slot / p.cache.block_size;
      if (slot < 0 || block >= p.cache.num_blocks) return {-1, 0};
      return {int(block), int(slot - block * p.cache.block_size)};
    }
    return stored(length + i);
  }
  __device__ int2 stored(int token) const {
    if (token < 0 || token >= int64_t(p.seqs.max_blocks) * p.cache.block_size) return {-1, 0};
    return {block_of(p.cache, p.seqs, sequence, token >> paging.shift), token & paging.mask};
  }
};

struct MeanScratch {
  float incoming[kWarps * 32 * kLaneChannels];  // [row slot, dim]
  float stored[kWarps * 32 * kLaneChannels];
  int counts[kWarps * 32];
};

// Where the mean of the group that starts at `token` lives; null: nowhere.
template <class T>
__device__ __half* mean_slot(const Source<T>& src, int token) {
  const int2 at = src.stored(token);
  if (at.x < 0) return nullptr;
  return rows_of<__half>(src.p.cache.k_mean, at.x, src.head) +
         int64_t(at.y / src.p.cache.group) * src.dim;
}

// Adds the usable stored rows of tokens [begin, end) of one group to this lane's sum.
template <class T>
__device__ int sum_stored(const Source<T>& src, int begin, int end, float (&sum)[kLaneChannels]) {
  const RowLanes at(src.dim);
  const int slots = kWarps * at.rows;
  int count = 0;
  float offsets = 0.f;
#pragma unroll 4
  for (int token = begin + int(threadIdx.x / 32) * at.rows + at.row; token < end; token += slots) {
    const int2 from = src.stored(token);
    if (at.row < 0 || from.x < 0) continue;
    const int64_t row = from.y;
    const float2 affine = __half22float2(rows_of<__half2>(src.params, from.x, src.head)[row]);
    float x[kLaneChannels];
    decode16(*reinterpret_cast<const uint4*>(rows_of<uint8_t>(src.data, from.x, src.head) +
                                             row * src.dim + at.channel()),
             x);
    if (isnan(affine.x)) continue;
    ++count;
    offsets += affine.y;
#pragma unroll
    for (int c = 0; c < kLaneChannels; ++c) sum[c] = fmaf(affine.x, x[c], sum[c]);
  }
  const __half* mean = count ? mean_slot(src, begin & -src.p.cache.group) : nullptr;
  if (mean) {
#pragma unroll
    for (int c = 0; c < kLaneChannels; ++c) {
      sum[c] += fmaf(float(count), __half2float(mean[at.channel() + c]), offsets);
    }
  }
  return count;
}

// Adds the usable incoming rows of tokens [begin, end), not rotated, to this lane's sum.
template <class T>
__device__ int sum_incoming(const Source<T>& src, int begin, int end, float (&sum)[kLaneChannels]) {
  const RowLanes at(src.dim);
  const int slots = kWarps * at.rows;
  int count = 0;
  for (int base = begin; base < end; base += slots) {
    const int i = base + int(threadIdx.x / 32) * at.rows + at.row - src.length;
    float x[kLaneChannels] = {};
    const bool there = at.row >= 0 && i < end - src.length && src.place(i).x >= 0;
    if (there) load16(src.row(i) + at.channel(), x);
    // A row counts only if all of its lanes are finite.
    const bool usable = row_max(there && all_finite(x) ? 0.f : 1.f, at) == 0.f;
    count += usable;
#pragma unroll
    for (int c = 0; c < kLaneChannels; ++c) sum[c] += usable ? x[c] : 0.f;
  }
  return count;
}

// Sums the usable rows of tokens [begin, end) into mean[dim]; returns how many there were.
template <class T>
__device__ int sum_rows(const Source<T>& src, int begin, int end, MeanScratch& scratch,
                        float* mean) {
  const RowLanes at(src.dim);
  const int slots = kWarps * at.rows, slot = int(threadIdx.x / 32) * at.rows + at.row;
  const int first = max(begin, first_token(src.p.seqs, src.sequence));
  const int last = min(end, src.length + src.call.count);
  float incoming[kLaneChannels] = {}, stored[kLaneChannels] = {};
  const int count = sum_stored(src, first, min(last, src.length), stored) +
                    sum_incoming(src, max(first, src.length), last, incoming);
  __syncthreads();  // the scratch may still be read
  if (at.row >= 0) {
#pragma unroll
    for (int c = 0; c < kLaneChannels; ++c) {
      scratch.incoming[slot * src.dim + at.channel() + c] = incoming[c];
      scratch.stored[slot * src.dim + at.channel() + c] = stored[c];
    }
    if (at.index == 0) scratch.counts[slot] = count;
  }
  __syncthreads();
  int total = 0;
  for (int s = 0; s < slots; ++s) total += scratch.counts[s];
  if (total == 0) return 0;
  for (int c = threadIdx.x; c < src.dim; c += kThreads) {
    float in = 0.f, old = 0.f;
    for (int s = 0; s < slots; ++s) {
      in += scratch.incoming[s * src.dim + c];
      old += scratch.stored[s * src.dim + c];
    }
    scratch.incoming[c] = in;
    mean[c] = old;
  }
  __syncthreads();
  if (threadIdx.x < 32) {  // the sum of rotated rows is the rotated sum
    float x[kLaneChannels];
#pragma unroll
    for (int c = 0; c < kLaneChannels; ++c) {
      x[c] = at.row >= 0 ? scratch.incoming[at.channel() + c] : 0.f;
    }
    rotate(x, src.rotation, at);
    if (at.row == 0) {
#pragma unroll
      for (int c = 0; c < kLaneChannels; ++c) {
        float& sum = mean[at.channel() + c];
        sum = (x[c] + sum) / total;
      }
    }
  }
  __syncthreads();
  return total;
}

// Leaves the group's mean in mean[dim], as stored.
template <class T>
__device__ void group_mean(const Source<T>& src, int start, int end, MeanScratch& scratch,
                           float* mean) {
  const int group = src.p.cache.group;
  __half* slot = mean_slot(src, start);
  const bool opens = start >= src.length;
  if (opens) {
    const bool found = start > 0 && sum_rows(src, start - group, start, scratch, mean) > 0;
    if (!found && sum_rows(src, start, end, scratch, mean) < int8::kMinMeanRows) {
      for (int c = threadIdx.x; c < src.dim; c += kThreads) mean[c] = 0.f;
    }
  }
  __syncthreads();
  for (int c = threadIdx.x; c < src.dim; c += kThreads) {
    if (opens && slot) {
      slot[c] = __float2half_rn(fminf(fmaxf(mean[c], -int8::kMaxAbs), int8::kMaxAbs));
    }
    mean[c] = slot ? __half2float(slot[c]) : 0.f;  // as readers will find it
  }
  __syncthreads();
}

// Quantises tokens [begin, end) of the source.
template <class T>
__device__ void write_rows(const Source<T>& src, int begin, int end, const float* mean) {
  const RowLanes at(src.dim);
  const int slots = kWarps * at.rows;
  for (int base = begin; base < end; base += slots) {
    const int token = base + int(threadIdx.x / 32) * at.rows + at.row;
    const bool mine = at.row >= 0 && token < end;
    const int2 to = mine ? src.place(token - src.length) : int2{-1, 0};
    float x[kLaneChannels] = {};
    if (to.x >= 0) load16(src.row(token - src.length) + at.channel(), x);
    const bool finite = row_max(all_finite(x) ? 0.f : 1.f, at) == 0.f;
    rotate(x, src.rotation, at);
    float low = INFINITY, high = -INFINITY;
#pragma unroll
    for (int c = 0; c < kLaneChannels; ++c) {
      if (mean) x[c] = __fsub_rn(x[c], mean[at.channel() + c]);
      low = fminf(low, x[c]);
      high = fmaxf(high, x[c]);
    }
    low = -row_max(-low, at);
    high = row_max(high, at);
    const int8::RowParams row = int8::row_params(low, high, finite);
    const float offset = int8::half_to_float(row.offset);
    const float inverse = __fdiv_rn(1.f, int8::half_to_float(row.scale));
    const uint4 codes = encode16(x, [&](float y) {
      const float code = rintf(__fmul_rn(__fsub_rn(y, offset), inverse));
      return fminf(fmaxf(code, 0.f), 255.f);  // a NaN becomes 0
    });
    if (to.x < 0) continue;
    const int64_t r = to.y;
    *reinterpret_cast<uint4*>(rows_of<uint8_t>(src.data, to.x, src.head) + r * src.dim +
                              at.channel()) = codes;
    if (at.index == 0) {
      rows_of<uint32_t>(src.params, to.x, src.head)[r] = uint32_t(row.scale) | uint32_t(row.offset)
                                                                                   << 16;
    }
  }
}

// The last block to have read the lengths adds the call's tokens to them.
__device__ void advance_lengths(const AppendParams& p) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
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

// grid: (chunks, kv_heads, batch * 2): K and V are even and odd in z.
template <class T>
__global__ void __launch_bounds__(kThreads) append_kernel(const AppendParams p) {
  __shared__ MeanScratch scratch;
  __shared__ float mean[256];
  const bool is_key = blockIdx.z % 2 == 0;
  const int sequence = blockIdx.z / 2;
  const CacheView& cache = p.cache;
  const Source<T> src{p,
                      is_key ? p.key : p.value,
                      is_key ? cache.k_data : cache.v_data,
                      is_key ? cache.k_params : cache.v_params,
                      is_key ? cache.k_dim : cache.v_dim,
                      is_key ? cache.k_rotation : cache.v_rotation,
                      sequence,
                      int(blockIdx.y),
                      call_rows(p.seqs, sequence),
                      p.seqs.seq_lens ? max(0, p.seqs.seq_lens[sequence]) : 0,
                      Paging(cache, p.seqs.max_blocks)};
  if (p.advance) advance_lengths(p);
  const int chunk = cache.group ? cache.group : kChunk;
  const int start = (src.length / chunk + int(blockIdx.x)) * chunk;
  const int begin = max(start, src.length), end = min(start + chunk, src.length + src.call.count);
  if (begin >= end) return;
  const bool has_mean = is_key && cache.group;
  if (has_mean) group_mean(src, start, end, scratch, mean);
  write_rows(src, begin, end, has_mean ? mean : nullptr);
}

}  // namespace

Status append(const AppendParams& params, Launch launch) {
  const int chunk = params.cache.group ? params.cache.group : kChunk;
  const int64_t tokens = params.seqs.tokens;
  if (tokens == 0 || params.seqs.batch == 0) return Status::ok();
  const dim3 grid(unsigned((tokens + chunk - 2) / chunk + 1), unsigned(params.cache.kv_heads),
                  unsigned(params.seqs.batch * 2));
  if (grid.z > 65535) return Status::unsupported("batch over 32767");
  return launch_on(launch, [&](cudaStream_t stream) {
    dispatch_dtype(params.dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      append_kernel<T><<<grid, kThreads, 0, stream>>>(params);
    });
  });
}

}  // namespace kvquant::cuda
