// The kernel for many query rows: its instances and their launch.
#include <mutex>

#include "formats/formats.h"
#include "kernels/device.cuh"
#include "kernels/rows/kernel.cuh"

namespace kvquant::cuda {
namespace {

// Keys as the copy engine takes them: whole tiles, or pieces of 16 tokens.
cudaError_t map_keys(const CacheView& cache, int max_blocks, CUtensorMap& map) {
  using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*,
                              const cuuint64_t*, const cuuint64_t*, const cuuint32_t*,
                              const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                              CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  static const Encode encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result{};
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found,
                                                               12000, cudaEnableDefault, &result);
    return error == cudaSuccess ? reinterpret_cast<Encode>(found) : nullptr;
  }();
  if (!encode) return cudaErrorNotSupported;
  const int dim = cache.k.head_dim;
  const bool whole = max_blocks == 1 || cache.block_size >= 64;
  const cuuint64_t sizes[4] = {cuuint64_t(dim), cuuint64_t(cache.block_size),
                               cuuint64_t(cache.num_kv_heads), cuuint64_t(cache.num_blocks)};
  const cuuint64_t strides[3] = {cuuint64_t(dim), cuuint64_t(cache.k.codes.head_stride),
                                 cuuint64_t(cache.k.codes.block_stride)};
  const cuuint32_t box[4] = {cuuint32_t(dim), whole ? 64u : 16u, 1, 1}, steps[4] = {1, 1, 1, 1};
  const CUresult result =
      encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 4, cache.k.codes.data, sizes, strides, box, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE,
             dim == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

template <class Traits>
cudaError_t launch_traits(AttentionCall call, cudaStream_t stream) {
  constexpr size_t kBytes = sizeof(RowsShared<Traits>);
  cudaError_t error = cudaFuncSetAttribute(
      rows_kernel<Traits>, cudaFuncAttributeMaxDynamicSharedMemorySize, int(kBytes));
  if (error != cudaSuccess) return error;
  error = cudaFuncSetAttribute(rows_kernel<Traits>, cudaFuncAttributePreferredSharedMemoryCarveout,
                               cudaSharedmemCarveoutMaxShared);
  if (error != cudaSuccess) return error;
  CUtensorMap keys;
  error = map_keys(call.cache, call.seqs.max_blocks, keys);
  if (error != cudaSuccess) return error;
  call.cluster = cluster_of(call.splits, call.split_size);
#ifdef KVQ_ONLY128
  if (const char* c = getenv("KVQ_CLUSTER")) call.cluster = std::min(call.splits, atoi(c));
#endif
  const int layers = (call.splits + call.cluster - 1) / call.cluster * call.cluster;
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {1, 1, unsigned(call.cluster)};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(call.row_tiles * call.cache.num_kv_heads),
                        unsigned(call.seqs.batch), unsigned(layers));
  config.blockDim = Traits::kThreads;
  config.dynamicSmemBytes = kBytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = 2;
  return cudaLaunchKernelEx(&config, rows_kernel<Traits>, call, keys);
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
#ifdef KVQ_ONLY128
  return shape.rows == 32 ? launch_traits<RowsTraits<FormatPair<Int8, Int8>, 128, 32, __half, true>>(call, stream) : launch_traits<RowsTraits<FormatPair<Int8, Int8>, 128, 64, __half, true>>(call, stream);
#else
  return shape.head_dim == 64 ? launch_dim<64>(call, shape.rows, stream)
                              : launch_dim<128>(call, shape.rows, stream);
#endif
}

}  // namespace kvquant::cuda
