// The kernel for many query rows: its instances and their launch.
#include <mutex>

#include "formats/formats.h"
#include "kernels/device.cuh"
#include "kernels/rows/kernel.cuh"

namespace kvquant::cuda {
namespace {

template <class Traits>
cudaError_t launch_traits(AttentionCall call, cudaStream_t stream) {
  constexpr size_t kBytes = sizeof(RowsShared<Traits>);
  cudaError_t error = cudaFuncSetAttribute(
      rows_kernel<Traits>, cudaFuncAttributeMaxDynamicSharedMemorySize, int(kBytes));
  if (error != cudaSuccess) return error;
  error = cudaFuncSetAttribute(rows_kernel<Traits>, cudaFuncAttributePreferredSharedMemoryCarveout,
                               cudaSharedmemCarveoutMaxShared);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(call.row_tiles * call.cache.num_kv_heads),
                        unsigned(call.seqs.batch), unsigned(call.splits));
  config.blockDim = Traits::kThreads;
  config.dynamicSmemBytes = kBytes;
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, rows_kernel<Traits>, call);
}

// Rows that are aligned go in accesses of four channels.
template <int kDim, int kRows, class T>
cudaError_t launch_type(const AttentionCall& call, cudaStream_t stream) {
  using Formats = FormatPair<Int8, Int8>;
  return is_aligned<T>(call.query) && is_aligned<T>(call.out)
             ? launch_traits<RowsTraits<Formats, kDim, kRows, T, true>>(call, stream)
             : launch_traits<RowsTraits<Formats, kDim, kRows, T, false>>(call, stream);
}
template <int kDim>
cudaError_t launch_dim(const AttentionCall& call, int rows, cudaStream_t stream) {
  const auto launch = [&](auto type) {
    using T = decltype(type);
    return rows == 32 ? launch_type<kDim, 32, T>(call, stream)
                      : launch_type<kDim, 64, T>(call, stream);
  };
  return call.dtype == Dtype::kFloat16 ? launch(__half{}) : launch(__nv_bfloat16{});
}

}  // namespace

cudaError_t launch_many_rows(const AttentionCall& call, const AttentionShape& shape,
                             cudaStream_t stream) {
  return shape.head_dim == 64 ? launch_dim<64>(call, shape.rows, stream)
                              : launch_dim<128>(call, shape.rows, stream);
}

}  // namespace kvquant::cuda
