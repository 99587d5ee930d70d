// The launch of one instance: rows and element type to Traits.
#pragma once

#include <mutex>

#include "kernels/attention/kernel.cuh"
#include "kernels/common/device.cuh"

namespace kvquant::cuda {

// What a device gives an instance, asked once.
struct Allowance {
  cudaError_t error;
  int stages;  // of a warp's ring
  size_t bytes;
};

template <class Traits>
Allowance ask_device(int device) {
  using Shared = AttentionShared<Traits>;
  static_assert(Shared::bytes(1) <= 64 << 10, "what a block of sm_75 may have");
  int stages = 1, carveout = cudaSharedmemCarveoutDefault;
  if constexpr (Traits::kShape.ring) {
    int most = 0, all = 0, reserved = 0;
    cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    cudaDeviceGetAttribute(&all, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
    cudaDeviceGetAttribute(&reserved, cudaDevAttrReservedSharedMemoryPerBlock, device);
    stages = ring_stages(std::min(most, all / Traits::kShape.blocks - reserved),
                         int(Shared::bytes(0)), Shared::kStageBytes);
    carveout = cudaSharedmemCarveoutMaxShared;
  }
  const size_t bytes = Shared::bytes(stages);
  void (*const kernel)(AttentionCall) = attention_kernel<Traits>;
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
  if (error == cudaSuccess) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, carveout);
  }
  return {error, stages, bytes};
}

template <class Traits>
const Allowance& allowance() {
  constexpr int kDevices = 64;
  static const Allowance none{cudaErrorInvalidDevice, 0, 0};
  static std::once_flag asked[kDevices];
  static Allowance allowances[kDevices];
  int device = 0;
  cudaGetDevice(&device);
  if (device >= kDevices) return none;
  std::call_once(asked[device], [&] { allowances[device] = ask_device<Traits>(device); });
  return allowances[device];
}

template <class Traits>
cudaError_t launch_instance(AttentionCall call, cudaStream_t stream) {
  const Allowance& allowed = allowance<Traits>();
  if (allowed.error != cudaSuccess) return allowed.error;
  call.stages = allowed.stages;
  const dim3 grid(unsigned(call.row_tiles * call.splits), unsigned(call.cache.kv_heads),
                  unsigned(call.seqs.batch));
  attention_kernel<Traits><<<grid, Traits::kThreads, allowed.bytes, stream>>>(call);
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

// The usual instance where it serves, else the one that knows all features.
template <int kDim, int kRows, class T, bool kMany>
cudaError_t launch_features(const AttentionCall& call, cudaStream_t stream) {
  using Usual = AttentionTraits<kDim, kRows, T, true, kMany>;
  return Usual::serves(call)
             ? launch_instance<Usual>(call, stream)
             : launch_instance<AttentionTraits<kDim, kRows, T, false, kMany>>(call, stream);
}

template <int kDim, int kRows, class T>
cudaError_t launch_rows(const AttentionCall& call, bool many, cudaStream_t stream) {
  constexpr bool kFloat = std::is_same_v<T, float>;
  constexpr bool kDiffer = instance_shape(kDim, kRows, kFloat, true).ring !=
                           instance_shape(kDim, kRows, kFloat, false).ring;
  if constexpr (kDiffer) {
    if (many) return launch_features<kDim, kRows, T, true>(call, stream);
  }
  return launch_features<kDim, kRows, T, false>(call, stream);
}

template <int kDim>
cudaError_t launch_dim(const AttentionCall& call, int rows, bool many, cudaStream_t stream) {
  if (call.dtype == Dtype::kFloat32) return launch_rows<kDim, 8, float>(call, many, stream);
  return with_rows<max_rows(kDim)>(rows, [&](auto rows) {
    return call.dtype == Dtype::kFloat16
               ? launch_rows<kDim, rows(), __half>(call, many, stream)
               : launch_rows<kDim, rows(), __nv_bfloat16>(call, many, stream);
  });
}

}  // namespace kvquant::cuda
