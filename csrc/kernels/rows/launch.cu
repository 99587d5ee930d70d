// The kernel for many query rows: its instances and their launch.
#include <array>
#include <atomic>

#include "kernels/device.cuh"
#include "kernels/rows/kernel.cuh"

namespace kvquant::cuda {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);
Encode find_encode() {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result{};
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found,
                                                             12000, cudaEnableDefault, &result);
  return error == cudaSuccess ? reinterpret_cast<Encode>(found) : nullptr;
}

// How the copy engine finds the cache's rows.
cudaError_t map_cache(const CacheView& cache, int max_blocks, RowsMaps& maps) {
  static const Encode encode = find_encode();
  if (!encode) return cudaErrorNotSupported;
  const bool is_whole = max_blocks == 1 || cache.block_size >= kRowsTile;
  const cuuint64_t rows = cache.block_size;
  const cuuint32_t box_rows = is_whole ? kRowsTile : kTile, dim = cache.k.head_dim;
  CUresult result = CUDA_SUCCESS;
  const auto map = [&](CUtensorMap& to, const Slab& slab, CUtensorMapDataType type,
                       std::array<cuuint64_t, 2> size, std::array<cuuint32_t, 2> box,
                       CUtensorMapSwizzle swizzle) {
    const cuuint64_t sizes[] = {size[0], size[1], cuuint64_t(cache.num_kv_heads),
                                cuuint64_t(cache.num_blocks)};
    const cuuint64_t strides[] = {dim, cuuint64_t(slab.head_stride), cuuint64_t(slab.block_stride)};
    const cuuint32_t boxes[] = {box[0], box[1], 1, 1}, steps[] = {1, 1, 1, 1};
    if (result != CUDA_SUCCESS) return;
    result =
        encode(&to, type, 4, slab.data, sizes, strides, boxes, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
               swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  };
  const auto map_codes = [&](CUtensorMap& to, const Slab& slab, CUtensorMapSwizzle swizzle) {
    map(to, slab, CU_TENSOR_MAP_DATA_TYPE_UINT8, {dim, rows}, {dim, box_rows}, swizzle);
  };
  const auto map_params = [&](CUtensorMap& to, const Slab& slab) {
    map(to, slab, CU_TENSOR_MAP_DATA_TYPE_UINT32, {rows, 1}, {box_rows, 1},
        CU_TENSOR_MAP_SWIZZLE_NONE);
  };
  map_codes(maps.k, cache.k.codes,
            dim == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B);
  map_codes(maps.v, cache.v.codes, CU_TENSOR_MAP_SWIZZLE_NONE);
  if (is_whole) {
    map_params(maps.k_params, cache.k.params);
    map_params(maps.v_params, cache.v.params);
  }
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
  RowsMaps maps;
  cudaError_t error = allow_memory<Traits>();
  if (error == cudaSuccess) error = map_cache(call.cache, call.seqs.max_blocks, maps);
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
  return cudaLaunchKernelEx(&config, rows_kernel<Traits>, call, maps);
}

template <int kDim, int kRows>
cudaError_t launch_rows(const AttentionCall& call, cudaStream_t stream) {
  using T = Element16;
  return is_aligned<T>(call.query) && is_aligned<T>(call.out)
             ? launch_traits<RowsTraits<kDim, kRows, T, true>>(call, stream)
             : launch_traits<RowsTraits<kDim, kRows, T, false>>(call, stream);
}
template <int kDim>
cudaError_t launch_dim(const AttentionCall& call, int rows, cudaStream_t stream) {
  return rows == 32 ? launch_rows<kDim, 32>(call, stream) : launch_rows<kDim, 64>(call, stream);
}

}  // namespace

cudaError_t launch_many_rows(const AttentionCall& call, int rows, cudaStream_t stream) {
  return call.cache.k.head_dim == 64 ? launch_dim<64>(call, rows, stream)
                                     : launch_dim<128>(call, rows, stream);
}

}  // namespace kvquant::cuda
