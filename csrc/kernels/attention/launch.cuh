// The launch of one instance: rows and element type to Traits.
#pragma once

#include <mutex>

#include "kernels/attention/kernel.cuh"
#include "kernels/device.cuh"

namespace kvquant::cuda {

// What a device gives an instance, asked once.
struct Allowance {
  cudaError_t error;
  int stages;  // of a warp's ring
  size_t bytes;
  unsigned starts_early = 0;  // 1: a launch may start before the one ahead of it has ended
};

template <class Traits>
Allowance ask_device(int device) {
  using Shared = AttentionShared<Traits>;
  static_assert(Shared::bytes(1) <= 64 << 10, "what a block of sm_75 may have");
  Allowance allowed{cudaSuccess, 1, 0};
  int carveout = cudaSharedmemCarveoutDefault;
  if constexpr (Traits::kShape.stages > 0) {
    int most = 0, all = 0, reserved = 0;
    cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    cudaDeviceGetAttribute(&all, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
    cudaDeviceGetAttribute(&reserved, cudaDevAttrReservedSharedMemoryPerBlock, device);
    const int room = std::min(most, all / Traits::kShape.blocks - reserved) - int(Shared::bytes(0));
    allowed.stages = std::max(1, std::min(Traits::kShape.stages, room / Shared::kStageBytes));
    carveout = cudaSharedmemCarveoutMaxShared;
  }
  allowed.bytes = Shared::bytes(allowed.stages);
  void (*const kernel)(AttentionCall) = attention_kernel<Traits>;
  // Code for older GPUs, which the driver may have translated, has no wait_for_previous_launch().
  cudaFuncAttributes attributes{};
  allowed.error = cudaFuncGetAttributes(&attributes, kernel);
  allowed.starts_early = attributes.ptxVersion >= 90;
  const auto set = [&](cudaFuncAttribute attribute, int value) {
    if (allowed.error == cudaSuccess)
      allowed.error = cudaFuncSetAttribute(kernel, attribute, value);
  };
  set(cudaFuncAttributeMaxDynamicSharedMemorySize, int(allowed.bytes));
  set(cudaFuncAttributePreferredSharedMemoryCarveout, carveout);
  return allowed;
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
  // The kernel waits for the launch before it (wait_for_previous_launch).
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(call.row_tiles * call.cache.num_kv_heads),
                        unsigned(call.seqs.batch), unsigned(call.splits));
  config.blockDim = Traits::kThreads;
  config.dynamicSmemBytes = allowed.bytes;
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = allowed.starts_early;
  return cudaLaunchKernelEx(&config, attention_kernel<Traits>, call);
}

// Calls f with the constant that equals `rows`. kFew: of 8 and kMost alone.
template <int kMost, bool kFew, class F>
cudaError_t with_query_rows(int rows, F&& f) {
  if constexpr (kMost > 8) {
    if (rows < kMost) return with_query_rows<kFew ? 8 : kMost / 2, kFew>(rows, f);
  }
  return f(std::integral_constant<int, kMost>{});
}

// Which instances are compiled. By age: of 8 rows and of the most; those of 8 for plain calls, and
// for all calls in the usual occupancy.
template <class Formats, int kDim, int kRows, class T>
constexpr bool has_plain() {
  return !Formats::kByAge || (kRows == 8 && kDim != 192 && !std::is_same_v<T, float>);
}
template <class Formats>
constexpr bool has_full(Occupancy occupancy) {
  return !Formats::kByAge || occupancy == Occupancy::kUsual;
}

// The plain call's instance where it serves, else the one that knows all features.
template <class Formats, int kDim, int kRows, class T, Occupancy kOccupancy>
cudaError_t launch_features(const AttentionCall& call, cudaStream_t stream) {
  using Plain = AttentionTraits<Formats, kDim, kRows, T, true, kOccupancy>;
  using Full = AttentionTraits<Formats, kDim, kRows, T, false, kOccupancy>;
  if constexpr (has_plain<Formats, kDim, kRows, T>()) {
    if (Plain::serves(call)) return launch_instance<Plain>(call, stream);
  }
  if constexpr (has_full<Formats>(kOccupancy)) {
    return launch_instance<Full>(call, stream);
  } else {
    return launch_features<Formats, kDim, kRows, T, Occupancy::kUsual>(call, stream);
  }
}

// The instance of this occupancy, where it is another one than the usual.
template <class Formats, int kDim, int kRows, class T>
cudaError_t launch_rows(const AttentionCall& call, Occupancy occupancy, cudaStream_t stream) {
  constexpr auto shape = [](Occupancy of) {
    return instance_shape(kDim, kRows, std::is_same_v<T, float>, of);
  };
  constexpr auto kUsual = Occupancy::kUsual, kOne = Occupancy::kOneBlock,
                 kMany = Occupancy::kManyBlocks;
  if constexpr (!(shape(kOne) == shape(kUsual))) {
    if (occupancy == kOne) return launch_features<Formats, kDim, kRows, T, kOne>(call, stream);
  }
  if constexpr (!(shape(kMany) == shape(kUsual))) {
    if (occupancy == kMany) return launch_features<Formats, kDim, kRows, T, kMany>(call, stream);
  }
  return launch_features<Formats, kDim, kRows, T, kUsual>(call, stream);
}

template <class Formats, int kDim>
cudaError_t launch_dim(const AttentionCall& call, int rows, Occupancy occupancy,
                       cudaStream_t stream) {
  if (call.dtype == Dtype::kFloat32)
    return launch_rows<Formats, kDim, 8, float>(call, occupancy, stream);
  return with_query_rows<max_rows(kDim), Formats::kByAge>(rows, [&](auto rows) {
    return launch_rows<Formats, kDim, rows(), Element16>(call, occupancy, stream);
  });
}

}  // namespace kvquant::cuda
