// The kernel for many query rows: its instances and their launch.
#include <mutex>

#include "formats/formats.h"
#include "kernels/device.cuh"
#include "kernels/rows/kernel.cuh"

namespace kvquant::cuda {
namespace {

template <class Traits>
cudaError_t launch_rows(AttentionCall call, cudaStream_t stream) {
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

template <int kDim, int kRows>
cudaError_t launch_type(const AttentionCall& call, cudaStream_t stream) {
  using Formats = FormatPair<Int8, Int8>;
  return call.dtype == Dtype::kFloat16
             ? launch_rows<RowsTraits<Formats, kDim, kRows, __half>>(call, stream)
             : launch_rows<RowsTraits<Formats, kDim, kRows, __nv_bfloat16>>(call, stream);
}

}  // namespace

cudaError_t launch_rows(const AttentionCall& call, const AttentionShape& shape,
                        cudaStream_t stream) {
#ifdef KVQ_ONLY128
  return shape.rows == 32 ? launch_type<128, 32>(call, stream) : launch_type<128, 64>(call, stream);
#else
  if (shape.head_dim == 64) {
    return shape.rows == 32 ? launch_type<64, 32>(call, stream) : launch_type<64, 64>(call, stream);
  }
  return shape.rows == 32 ? launch_type<128, 32>(call, stream) : launch_type<128, 64>(call, stream);
#endif
}

}  // namespace kvquant::cuda
