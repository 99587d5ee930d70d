// The launch of one instance: rows and element type to Traits, shared memory to stages.
#pragma once

#include <mutex>

#include "kernels/attention/kernel.cuh"
#include "kernels/common/device.cuh"

namespace kvquant::cuda {

// How an instance runs on a device: asked once.
struct Residency {
  int stages, bytes, blocks;  // blocks: of the whole device
  cudaError_t error;
};
template <class Traits>
Residency find_residency(int device) {
  static_assert(sizeof(AttentionShared<Traits>) - stage_bytes(Traits::kDim) <=
                fixed_bytes(Traits::kDim, Traits::kRows, Traits::kSplit));
  int limit = 0, total = 0, multiprocessors = 0, blocks = 0;
  cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  cudaDeviceGetAttribute(&total, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  Residency r{};
  r.stages = choose_stages(Traits::kDim, Traits::kRows, Traits::kSplit, limit, total);
  if (r.stages < 1) return {0, 0, 0, cudaErrorInvalidConfiguration};
  r.bytes = int(sizeof(AttentionShared<Traits>)) + (r.stages - 1) * stage_bytes(Traits::kDim);
  const auto kernel = attention_kernel<Traits>;
  r.error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, r.bytes);
  if (r.error != cudaSuccess) return r;
  r.error =
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kAttentionThreads, r.bytes);
  r.blocks = blocks * multiprocessors;
  return r;
}

template <class Traits>
cudaError_t launch_instance(const AttentionParams& params, const AttentionPlan& plan,
                            cudaStream_t stream) {
  constexpr int kDevices = 64;
  static std::once_flag asked[kDevices];
  static Residency known[kDevices];
  int device = 0;
  cudaGetDevice(&device);
  if (device >= kDevices) return cudaErrorInvalidDevice;
  std::call_once(asked[device], [&] { known[device] = find_residency<Traits>(device); });
  const Residency& r = known[device];
  if (r.error != cudaSuccess) return r.error;
  const int total = int(plan.counters - 1) * params.splits;
  attention_kernel<Traits><<<std::min(total, r.blocks), kAttentionThreads, r.bytes, stream>>>(
      params, r.stages, plan.row_tiles, total);
  return cudaGetLastError();
}

// Calls f with the constant that equals `rows`.
template <int kMost, class F>
cudaError_t with_rows(int rows, F&& f) {
  if constexpr (kMost > 8) {
    if (rows < kMost) return with_rows<kMost / 2>(rows, f);
  }
  return f(std::integral_constant<int, kMost>{});
}

template <int kDim>
cudaError_t launch_dim(const AttentionParams& params, const AttentionPlan& plan,
                       cudaStream_t stream) {
  if (params.dtype == Dtype::kFloat32) {
    return launch_instance<AttentionTraits<kDim, 8, float>>(params, plan, stream);
  }
  return with_rows<max_rows(kDim)>(plan.rows, [&](auto rows) {
    return params.dtype == Dtype::kFloat16
               ? launch_instance<AttentionTraits<kDim, rows(), __half>>(params, plan, stream)
               : launch_instance<AttentionTraits<kDim, rows(), __nv_bfloat16>>(params, plan,
                                                                               stream);
  });
}

}  // namespace kvquant::cuda
