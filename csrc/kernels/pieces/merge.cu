// Merges the results of attention over pieces of a history: out = sum_i exp(lse_i - lse) out_i.
#include <type_traits>

#include "common/cuda/element.cuh"
#include "kernels/device.cuh"

namespace kvquant::cuda {
namespace {

constexpr int kThreads = 256, kWidth = 8;  // channels of a thread

template <class T>
__device__ __forceinline__ void load_width(const void* base, int64_t at, float (&x)[kWidth]) {
  constexpr int kPer = 16 / sizeof(T);
  const T* const from = static_cast<const T*>(base) + at;
  const bool aligned = reinterpret_cast<uintptr_t>(from) % 16 == 0;
#pragma unroll
  for (int i = 0; i < kWidth; i += kPer) {
    T part[kPer];
    if (aligned) {
      const auto words = load_stream<uint4>(from + i);
      memcpy(part, &words, 16);
    } else {
#pragma unroll
      for (int j = 0; j < kPer; ++j) part[j] = from[i + j];
    }
#pragma unroll
    for (int j = 0; j < kPer; ++j) x[i + j] = to_float(part[j]);
  }
}
template <class T>
__device__ __forceinline__ void store_width(void* base, int64_t at, const float (&x)[kWidth]) {
  constexpr int kPer = 16 / sizeof(T);
  T* const to = static_cast<T*>(base) + at;
  const bool aligned = reinterpret_cast<uintptr_t>(to) % 16 == 0;
#pragma unroll
  for (int i = 0; i < kWidth; i += kPer) {
    T part[kPer];
#pragma unroll
    for (int j = 0; j < kPer; ++j) part[j] = from_float<T>(x[i + j]);
    if (aligned) {
      store_vector<kPer>(to + i, part);
    } else {
#pragma unroll
      for (int j = 0; j < kPer; ++j) to[i + j] = part[j];
    }
  }
}

// A thread takes kWidth channels of a row.
template <class T>
__global__ void __launch_bounds__(kThreads) merge_kernel(const MergeParams p) {
  const int pieces = p.dim / kWidth;
  const int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t row = index / pieces;
  if (row >= int64_t(p.batch) * p.tokens * p.heads) return;
  const int channel = int(index - row * pieces) * kWidth;
  const int head = int(row % p.heads);
  const int64_t of = row / p.heads;
  const int token = int(of % p.tokens), sequence = int(of / p.tokens);
  const auto offset = [&](const Rows& rows, bool backwards) {
    const int at = backwards ? p.tokens - 1 - token : token;
    return sequence * rows.batch_stride + at * rows.token_stride + head * rows.head_stride;
  };
  const float sink = p.sinks ? p.sinks[head] : -INFINITY;
  float sums[kMostMerged], top = sink;
  bool bad = isnan(sink);
#pragma unroll
  for (int i = 0; i < kMostMerged; ++i) {
    if (i >= p.count) break;
    const MergeSource& from = p.sources[i];
    sums[i] = static_cast<const float*>(from.lse.data)[offset(from.lse, from.backwards)];
    bad = bad || isnan(sums[i]) || sums[i] == INFINITY;  // how flash says that it met a NaN
    top = fmaxf(top, sums[i]);
  }
  float total = sink > -INFINITY ? expf(sink - top) : 0.f, x[kWidth] = {};
#pragma unroll
  for (int i = 0; i < kMostMerged; ++i) {
    if (i >= p.count) break;
    const MergeSource& from = p.sources[i];
    if (sums[i] == -INFINITY) continue;
    const float weight = expf(sums[i] - top);
    total += weight;
    float part[kWidth];
    const int64_t at = offset(from.out, from.backwards) + channel;
    if (from.float32) {
      load_width<float>(from.out.data, at, part);
    } else {
      load_width<T>(from.out.data, at, part);
    }
#pragma unroll
    for (int c = 0; c < kWidth; ++c) x[c] = fmaf(weight, part[c], x[c]);
  }
  const float inverse = bad ? NAN : total > 0.f ? 1.f / total : 0.f;
#pragma unroll
  for (int c = 0; c < kWidth; ++c) x[c] *= inverse;
  const int64_t to = offset(p.out, false) + channel;
  if (p.float32) {
    store_width<float>(p.out.data, to, x);
  } else {
    store_width<T>(p.out.data, to, x);
  }
  if (p.lse.data && channel == 0) {
    const float lse = bad ? NAN : total > 0.f ? top + logf(total) : -INFINITY;
    static_cast<float*>(p.lse.data)[offset(p.lse, false)] = lse;
  }
}

}  // namespace

Status merge(const MergeParams& p, Launch launch) {
  if (p.count < 1 || p.count > kMostMerged) return Status::unsupported("so many results at once");
  const int64_t threads = int64_t(p.batch) * p.tokens * p.heads * (p.dim / kWidth);
  if (threads == 0) return Status::ok();
  return launch_on(launch, [&](cudaStream_t stream) {
    const auto start = [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      merge_kernel<T><<<ceil_div(threads, kThreads), kThreads, 0, stream>>>(p);
    };
    if (p.dtype == Dtype::kFloat16) {
      start(static_cast<__half*>(nullptr));
    } else {
      start(static_cast<__nv_bfloat16*>(nullptr));
    }
  });
}

}  // namespace kvquant::cuda
