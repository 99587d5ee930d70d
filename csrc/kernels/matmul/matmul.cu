// The unfused attention matmuls on plain (q, scale, zero) tensors of any granularity.
//
// One tiled kernel: the query rows of all heads of a KV head are the tile's rows, so a KV tile is
// read once for them; codes are dequantized on their way to shared memory, products are fp32.
#include "common/cuda/element.cuh"
#include "kernels/device.cuh"

namespace kvquant::cuda {
namespace {

constexpr int kRows = 16, kColumns = 64, kDepth = 32, kThreads = 256;

// Which index of the quantized tensor the product runs along.
enum class Product { kQk, kPv };

template <Product kProduct>
__global__ void __launch_bounds__(kThreads) matmul_kernel(const MatmulParams p) {
  __shared__ float xs[kDepth][kRows + 1];
  __shared__ float ys[kDepth][kColumns + 1];
  constexpr bool kQk = kProduct == Product::kQk;
  const int depth = kQk ? p.dim : p.tokens, columns = kQk ? p.tokens : p.dim;
  const int share = p.heads / p.kv_heads, rows = share * p.rows;
  const int b = blockIdx.z / p.kv_heads, h = blockIdx.z % p.kv_heads;
  const int row0 = blockIdx.y * kRows, column0 = blockIdx.x * kColumns;
  const uint8_t* q = p.q + b * p.batch_stride + h * p.head_stride;
  const Affine& a = p.affine;
  const int64_t pairs = b * a.batch_stride + h * a.head_stride;
  const int column = threadIdx.x % kColumns, part = threadIdx.x / kColumns;
  constexpr int kMine = kRows / (kThreads / kColumns);
  float sum[kMine] = {};
  for (int k0 = 0; k0 < depth; k0 += kDepth) {
    for (int i = threadIdx.x; i < kRows * kDepth; i += kThreads) {
      const int k = i % kDepth, r = i / kDepth, row = row0 + r;
      float x = 0.f;
      if (row < rows && k0 + k < depth) {
        x = load_element(p.x,
                         b * p.x_batch_stride + (h * share + row / p.rows) * p.x_head_stride +
                             (row % p.rows) * p.x_row_stride + k0 + k,
                         p.dtype);
      }
      xs[k][r] = x;
    }
    for (int i = threadIdx.x; i < kColumns * kDepth; i += kThreads) {
      // Neighbouring threads read neighbouring channels.
      const int k = kQk ? i % kDepth : i / kColumns, c = kQk ? i / kDepth : i % kColumns;
      const int token = kQk ? column0 + c : k0 + k, channel = kQk ? k0 + k : column0 + c;
      float y = 0.f;
      if (token < p.tokens && channel < p.dim) {
        const int64_t pair = pairs + token / a.group * a.group_stride + channel * a.channel_stride;
        y = a.scale[pair] * (float(q[token * p.token_stride + channel]) - a.zero[pair]);
      }
      ys[k][c] = y;
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
#pragma unroll
      for (int r = 0; r < kMine; ++r) {
        sum[r] = fmaf(xs[k][part * kMine + r], ys[k][column], sum[r]);
      }
    }
    __syncthreads();
  }
  if (column0 + column >= columns) return;
#pragma unroll
  for (int r = 0; r < kMine; ++r) {
    const int row = row0 + part * kMine + r;
    if (row >= rows) continue;
    const int64_t to = (int64_t(b) * p.heads + h * share) * p.rows + row;
    store_element(p.out, to * columns + column0 + column, p.dtype, sum[r]);
  }
}

template <Product kProduct>
Status launch_matmul(const MatmulParams& p, int columns, Launch launch) {
  const int rows = p.heads / p.kv_heads * p.rows;
  const dim3 grid(ceil_div(columns, kColumns), ceil_div(rows, kRows),
                  unsigned(p.batch * p.kv_heads));
  if (grid.z > 65535) return Status::unsupported("batch * kv_heads over 65535");
  if (grid.y > 65535) return Status::unsupported("query rows a KV head over 1048560");
  return launch_on(launch, [&](cudaStream_t stream) {
    matmul_kernel<kProduct><<<grid, kThreads, 0, stream>>>(p);
  });
}

}  // namespace

Status qk_matmul(const MatmulParams& p, Launch launch) {
  return launch_matmul<Product::kQk>(p, p.tokens, launch);
}
Status pv_matmul(const MatmulParams& p, Launch launch) {
  return launch_matmul<Product::kPv>(p, p.dim, launch);
}

}  // namespace kvquant::cuda
