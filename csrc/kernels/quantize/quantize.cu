// Quantize and dequantize plain tensors: x ~ scale * (q - zero), a pair a token, head or channel.
//
// token: a row's channels are dim / 16 lanes' registers: x is read once and written once as codes.
// head and channel: two passes, minimum and maximum first; the second comes from L2 where it fits.
#include "common/cuda/row.cuh"
#include "kernels/device.cuh"

namespace kvquant::cuda {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * 32;
constexpr int kHeadThreads = 1024;

struct Pair {
  float scale, zero;
};

// The steps of the reference, none of them fused.
__device__ __forceinline__ Pair make_pair(float low, float high, bool finite, float qmin,
                                          float qmax) {
  if (!finite) return {NAN, NAN};
  const float range = __fdiv_rn(__fsub_rn(high, low), __fsub_rn(qmax, qmin));
  const float steps = __fmul_rn(fmaxf(fabsf(low), fabsf(high)), 0x1p-20f);
  const float scale = fmaxf(fmaxf(range, steps), kMinScale);
  return {scale, __fsub_rn(qmin, __fdiv_rn(low, scale))};
}
__device__ __forceinline__ float code_of(float x, Pair pair, float inverse) {
  return __fadd_rn(__fmul_rn(x, inverse), pair.zero);
}
__device__ __forceinline__ uint8_t round_code(float code, float qmin, float qmax) {
  return uint8_t(rintf(fminf(fmaxf(code, qmin), qmax)));  // a NaN becomes qmin
}

struct RowIndex {
  int b, h, s;
};
__device__ __forceinline__ RowIndex split_row(int64_t row, int heads, int tokens) {
  const int64_t bh = row / tokens;
  return {int(bh / heads), int(bh % heads), int(row - bh * tokens)};
}
template <class P>
__device__ __forceinline__ int64_t offset_of(const P& p, RowIndex at) {
  return at.b * p.batch_stride + at.h * p.head_stride + at.s * p.token_stride;
}

// Rows of a multiple of 16 channels, at most 512.
template <class T>
__global__ void __launch_bounds__(kThreads) quantize_rows(const QuantizeParams p) {
  const RowLanes at(p.dim);
  const int64_t total = int64_t(p.batch) * p.heads * p.tokens;
  const int64_t row = (int64_t(blockIdx.x) * kWarps + threadIdx.x / 32) * at.rows + at.row;
  const bool mine = at.row >= 0 && row < total;
  float x[kLaneChannels] = {};
  if (mine) {
    load16(
        static_cast<const T*>(p.x) + offset_of(p, split_row(row, p.heads, p.tokens)) + at.channel(),
        x);
  }
  float low = x[0], high = x[0];
#pragma unroll
  for (int c = 1; c < kLaneChannels; ++c) {
    low = fminf(low, x[c]);
    high = fmaxf(high, x[c]);
  }
  low = -row_max(-low, at);
  high = row_max(high, at);
  const bool finite = row_all(all_finite(x), at);
  const Pair pair = make_pair(low, high, finite, p.qmin, p.qmax);
  const float inverse = __fdiv_rn(1.f, pair.scale);
  const uint4 codes =
      encode16(x, p.qmin, p.qmax, [&](float y) { return code_of(y, pair, inverse); });
  if (!mine) return;
  *reinterpret_cast<uint4*>(p.q + row * p.dim + at.channel()) = codes;
  if (at.index == 0) {
    p.scale[row] = pair.scale;
    p.zero[row] = pair.zero;
  }
}

// One block a pair over `rows` rows: a whole head, or a single row of any width.
template <class T>
__global__ void __launch_bounds__(kHeadThreads) quantize_heads(const QuantizeParams p, int rows) {
  __shared__ float lows[32], highs[32];
  __shared__ bool bad;
  const int64_t first = int64_t(blockIdx.x) * rows, count = int64_t(rows) * p.dim;
  if (threadIdx.x == 0) bad = false;
  __syncthreads();
  const auto element = [&](int64_t i) {
    const int64_t row = first + i / p.dim;
    const int64_t base = offset_of(p, split_row(row, p.heads, p.tokens));
    return to_float(static_cast<const T*>(p.x)[base + i % p.dim]);
  };
  float low = INFINITY, high = -INFINITY;
  bool finite = true;
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) {
    const float x = element(i);
    low = fminf(low, x);
    high = fmaxf(high, x);
    finite = finite && fabsf(x) <= kMaxAbs;
  }
  for (int step = 16; step; step /= 2) {
    low = fminf(low, __shfl_xor_sync(kFullWarp, low, step));
    high = fmaxf(high, __shfl_xor_sync(kFullWarp, high, step));
  }
  if (!finite) bad = true;
  if (threadIdx.x % 32 == 0) lows[threadIdx.x / 32] = low, highs[threadIdx.x / 32] = high;
  __syncthreads();
  for (int w = 0; w < int(blockDim.x / 32); ++w) {
    low = fminf(low, lows[w]);
    high = fmaxf(high, highs[w]);
  }
  const Pair pair = make_pair(low, high, !bad, p.qmin, p.qmax);
  const float inverse = __fdiv_rn(1.f, pair.scale);
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) {
    p.q[first * p.dim + i] = round_code(code_of(element(i), pair, inverse), p.qmin, p.qmax);
  }
  if (threadIdx.x == 0) {
    p.scale[blockIdx.x] = pair.scale;
    p.zero[blockIdx.x] = pair.zero;
  }
}

// grid: (groups, channels / threads, batch * heads); a thread takes one channel of a group.
template <class T>
__global__ void quantize_channels(const QuantizeParams p) {
  const int c = int(blockIdx.y) * blockDim.x + threadIdx.x;
  if (c >= p.dim) return;
  const int64_t bh = blockIdx.z;
  const int begin = int(blockIdx.x) * p.group, end = min(p.tokens, begin + p.group);
  const T* x = static_cast<const T*>(p.x) + (bh / p.heads) * p.batch_stride +
               (bh % p.heads) * p.head_stride + c;
  float low = INFINITY, high = -INFINITY;
  bool finite = true;
  for (int s = begin; s < end; ++s) {
    const float y = to_float(x[s * p.token_stride]);
    low = fminf(low, y);
    high = fmaxf(high, y);
    finite = finite && fabsf(y) <= kMaxAbs;
  }
  const Pair pair = make_pair(low, high, finite, p.qmin, p.qmax);
  const float inverse = __fdiv_rn(1.f, pair.scale);
  for (int s = begin; s < end; ++s) {
    p.q[(bh * p.tokens + s) * p.dim + c] =
        round_code(code_of(to_float(x[s * p.token_stride]), pair, inverse), p.qmin, p.qmax);
  }
  const int64_t at = (bh * gridDim.x + blockIdx.x) * p.dim + c;
  p.scale[at] = pair.scale;
  p.zero[at] = pair.zero;
}

// A thread takes `width` channels of a row: 16, or 1 where they don't divide.
template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads) dequantize_kernel(const DequantizeParams p) {
  const int64_t pieces = p.dim / kWidth, i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t row = i / pieces;
  const int c = int(i - row * pieces) * kWidth;
  if (row >= int64_t(p.batch) * p.heads * p.tokens) return;
  const RowIndex at = split_row(row, p.heads, p.tokens);
  const uint8_t* q = p.q + offset_of(p, at) + c;
  const Affine& a = p.affine;
  const int64_t pair = at.b * a.batch_stride + at.h * a.head_stride +
                       at.s / a.group * a.group_stride + c * a.channel_stride;
  T* out = static_cast<T*>(p.out) + row * p.dim + c;
  if constexpr (kWidth == kLaneChannels) {
    float x[kLaneChannels];
    if (reinterpret_cast<uintptr_t>(q) % 16 == 0) {
      decode16(__ldg(reinterpret_cast<const uint4*>(q)), x);
    } else {
#pragma unroll
      for (int k = 0; k < kLaneChannels; ++k) x[k] = q[k];
    }
    if (a.channel_stride == 0) {
      const float scale = a.scale[pair], zero = a.zero[pair];
#pragma unroll
      for (int k = 0; k < kLaneChannels; ++k) x[k] = __fmul_rn(scale, __fsub_rn(x[k], zero));
    } else {
#pragma unroll
      for (int k = 0; k < kLaneChannels; ++k) {
        const int64_t at_k = pair + k * a.channel_stride;
        x[k] = __fmul_rn(a.scale[at_k], __fsub_rn(x[k], a.zero[at_k]));
      }
    }
    store16(out, x);
  } else {
    *out = from_float<T>(__fmul_rn(a.scale[pair], __fsub_rn(float(*q), a.zero[pair])));
  }
}

}  // namespace

Status quantize(const QuantizeParams& p, Launch launch) {
  const int64_t heads = int64_t(p.batch) * p.heads, rows = heads * p.tokens;
  return launch_on(launch, [&](cudaStream_t stream) {
    dispatch_dtype(p.dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      if (p.granularity == Granularity::kChannel) {
        const int threads = p.dim < 128 ? 64 : 128;
        const dim3 grid(ceil_div(p.tokens, p.group), ceil_div(p.dim, threads), unsigned(heads));
        quantize_channels<T><<<grid, threads, 0, stream>>>(p);
      } else if (p.granularity == Granularity::kHead) {
        quantize_heads<T><<<unsigned(heads), kHeadThreads, 0, stream>>>(p, p.tokens);
      } else if (p.dim % kLaneChannels == 0 && p.dim <= 32 * kLaneChannels) {
        const int per_block = kWarps * (32 / (p.dim / kLaneChannels));
        quantize_rows<T><<<ceil_div(rows, per_block), kThreads, 0, stream>>>(p);
      } else {
        quantize_heads<T><<<unsigned(rows), 64, 0, stream>>>(p, 1);
      }
    });
  });
}

Status dequantize(const DequantizeParams& p, Launch launch) {
  const int64_t elements = int64_t(p.batch) * p.heads * p.tokens * p.dim;
  return launch_on(launch, [&](cudaStream_t stream) {
    dispatch_dtype(p.dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      if (p.dim % kLaneChannels == 0) {
        dequantize_kernel<T, kLaneChannels>
            <<<ceil_div(elements / kLaneChannels, kThreads), kThreads, 0, stream>>>(p);
      } else {
        dequantize_kernel<T, 1><<<ceil_div(elements, kThreads), kThreads, 0, stream>>>(p);
      }
    });
  });
}

}  // namespace kvquant::cuda
