// The kernel for many query rows: its instances and their launch.
#include <atomic>

#include "kernels/device.cuh"
#include "kernels/rows/kernel.cuh"

namespace kvquant::cuda {
namespace {

// Keys as the copy engine takes them: in boxes of whole tiles where blocks hold them, else in
// pieces of 16 tokens.
cudaError_t map_keys(const CacheView& cache, int max_blocks, CUtensorMap& map) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result{};
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found,
                                                               12000, cudaEnableDefault, &result);
    return error == cudaSuccess ? reinterpret_cast<Encode>(found) : nullptr;
  }();
  if (!encode) return cudaErrorNotSupported;
  const Slab& codes = cache.k.codes;
  const cuuint32_t dim = cuuint32_t(cache.k.head_dim);
  const bool is_whole = max_blocks == 1 || cache.block_size >= kRowsTile;
  const cuuint64_t sizes[] = {dim, cuuint64_t(cache.block_size), cuuint64_t(cache.num_kv_heads),
                              cuuint64_t(cache.num_blocks)};
  const cuuint64_t strides[] = {dim, cuuint64_t(codes.head_stride), cuuint64_t(codes.block_stride)};
  const cuuint32_t box[] = {dim, cuuint32_t(is_whole ? kRowsTile : kTile), 1, 1};
  const cuuint32_t steps[] = {1, 1, 1, 1};
  const CUresult result =
      encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 4, codes.data, sizes, strides, box, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE,
             dim == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// Once a device: shared memory beyond what every kernel may have.
template <class Traits>
cudaError_t allow_memory() {
  constexpr int kDevices = 64;
  static std::atomic<bool> is_allowed[kDevices];
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess || (device < kDevices && is_allowed[device])) return error;
  const auto set = [&](cudaFuncAttribute attribute, int value) {
    if (error == cudaSuccess) error = cudaFuncSetAttribute(rows_kernel<Traits>, attribute, value);
  };
  set(cudaFuncAttributeMaxDynamicSharedMemorySize, int(sizeof(RowsShared<Traits>)));
  set(cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  if (device < kDevices) is_allowed[device] = error == cudaSuccess;
  return error;
}

template <class Traits>
cudaError_t launch_traits(const AttentionCall& call, cudaStream_t stream) {
  CUtensorMap keys;
  cudaError_t error = allow_memory<Traits>();
  if (error == cudaSuccess) error = map_keys(call.cache, call.seqs.max_blocks, keys);
  if (error != cudaSuccess) return error;
  // The kernel waits for the launch before it (wait_for_previous_launch).
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(call.row_tiles * call.cache.num_kv_heads),
                        unsigned(call.seqs.batch), unsigned(call.splits));
  config.blockDim = Traits::kThreads;
  config.dynamicSmemBytes = sizeof(RowsShared<Traits>);
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, rows_kernel<Traits>, call, keys);
}

template <int kDim>
cudaError_t launch_dim(const AttentionCall& call, cudaStream_t stream) {
  using T = Element16;
  return is_aligned<T>(call.query) && is_aligned<T>(call.out)
             ? launch_traits<RowsTraits<kDim, T, true>>(call, stream)
             : launch_traits<RowsTraits<kDim, T, false>>(call, stream);
}

}  // namespace

cudaError_t launch_many_rows(const AttentionCall& call, cudaStream_t stream) {
  return call.cache.k.head_dim == 64 ? launch_dim<64>(call, stream) : launch_dim<128>(call, stream);
}

}  // namespace kvquant::cuda
