// The launch of one instance: rows and element type to Traits.
#pragma once

#include <mutex>

#include "kernels/attention/kernel.cuh"
#include "kernels/common/device.cuh"

namespace kvquant::cuda {

// Lets an instance have its shared memory: asked once a device.
template <class Traits>
cudaError_t allow_shared_memory() {
  static_assert(sizeof(AttentionShared<Traits>) <= 64 << 10, "what a block of sm_75 may have");
  constexpr int kDevices = 64;
  static std::once_flag asked[kDevices];
  static cudaError_t errors[kDevices];
  int device = 0;
  cudaGetDevice(&device);
  if (device >= kDevices) return cudaErrorInvalidDevice;
  std::call_once(asked[device], [&] {
    errors[device] =
        cudaFuncSetAttribute(attention_kernel<Traits>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             int(sizeof(AttentionShared<Traits>)));
  });
  return errors[device];
}

template <class Traits>
cudaError_t launch_instance(const AttentionCall& call, cudaStream_t stream) {
  const cudaError_t error = allow_shared_memory<Traits>();
  if (error != cudaSuccess) return error;
  const dim3 grid(unsigned(call.row_tiles * call.splits), unsigned(call.cache.kv_heads),
                  unsigned(call.seqs.batch));
  attention_kernel<Traits>
      <<<grid, Traits::kThreads, sizeof(AttentionShared<Traits>), stream>>>(call);
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
template <int kDim, int kRows, class T>
cudaError_t launch_rows(const AttentionCall& call, cudaStream_t stream) {
  using Usual = AttentionTraits<kDim, kRows, T, true>;
  return Usual::serves(call)
             ? launch_instance<Usual>(call, stream)
             : launch_instance<AttentionTraits<kDim, kRows, T, false>>(call, stream);
}

template <int kDim>
cudaError_t launch_dim(const AttentionCall& call, int rows, cudaStream_t stream) {
  if (call.dtype == Dtype::kFloat32) return launch_rows<kDim, 8, float>(call, stream);
  return with_rows<max_rows(kDim)>(rows, [&](auto rows) {
    return call.dtype == Dtype::kFloat16 ? launch_rows<kDim, rows(), __half>(call, stream)
                                         : launch_rows<kDim, rows(), __nv_bfloat16>(call, stream);
  });
}

}  // namespace kvquant::cuda
