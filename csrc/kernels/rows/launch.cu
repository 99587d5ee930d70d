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
cudaError_t map_cache(const CacheView& cache, const Sequences& seqs, RowsMaps& maps) {
  static const Encode encode = find_encode();
  if (!encode) return cudaErrorNotSupported;
  const bool is_whole = seqs.max_blocks == 1 || cache.block_size >= kRowsTile;
  const cuuint32_t box_rows = is_whole ? kRowsTile : kTile, dim = cache.k.head_dim;
  CUresult result = CUDA_SUCCESS;
  const auto map = [&](CUtensorMap& to, const Slab& slab, cuuint64_t count, cuuint64_t row_bytes,
                       CUtensorMapDataType type, std::array<cuuint64_t, 2> size,
                       std::array<cuuint32_t, 2> box, CUtensorMapSwizzle swizzle) {
    const cuuint64_t sizes[] = {size[0], size[1], cuuint64_t(cache.num_kv_heads), count};
    const cuuint64_t strides[] = {row_bytes, cuuint64_t(slab.head_stride),
                                  cuuint64_t(slab.block_stride)};
    const cuuint32_t boxes[] = {box[0], box[1], 1, 1}, steps[] = {1, 1, 1, 1};
    if (result != CUDA_SUCCESS) return;
    result =
        encode(&to, type, 4, slab.data, sizes, strides, boxes, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
               swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  };
  // A byte a channel, as the products take keys; packed ones are not yet in that order.
  const auto swizzle = dim == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B;
  const auto map_codes = [&](CUtensorMap& to, const RowsView& of, bool is_key) {
    const auto bytes = cuuint32_t(code_bytes(of.format, dim));
    map(to, of.codes, cache.num_blocks, bytes, CU_TENSOR_MAP_DATA_TYPE_UINT8,
        {bytes, cuuint64_t(cache.block_size)}, {bytes, box_rows},
        is_key && bytes == dim ? swizzle : CU_TENSOR_MAP_SWIZZLE_NONE);
  };
  // Of one row, whose stride is not used.
  const auto map_params = [&](CUtensorMap& to, const RowsView& of) {
    map(to, of.params, cache.num_blocks, dim, CU_TENSOR_MAP_DATA_TYPE_UINT32,
        {cuuint64_t(cache.block_size), 1}, {box_rows, 1}, CU_TENSOR_MAP_SWIZZLE_NONE);
  };
  map_codes(maps.k, cache.k, true);
  map_codes(maps.v, cache.v, false);
  if (is_whole) {
    map_params(maps.k_params, cache.k);
    map_params(maps.v_params, cache.v);
  }
  if (seqs.young.data) {
    const CacheView young = young_view(cache, seqs);
    const auto rows = cuuint64_t(young_rows(chunk_tokens(cache)));
    const auto map_young = [&](CUtensorMap& to, const Slab& codes, CUtensorMapSwizzle swizzle) {
      map(to, codes, seqs.batch, dim, CU_TENSOR_MAP_DATA_TYPE_UINT8, {dim, rows}, {dim, kYoungBox},
          swizzle);
    };
    map_young(maps.young_k, young.k.codes, swizzle);
    map_young(maps.young_v, young.v.codes, CU_TENSOR_MAP_SWIZZLE_NONE);
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
  if (error == cudaSuccess) error = map_cache(call.cache, call.seqs, maps);
  if (error != cudaSuccess) return error;
  // The kernel waits for what the launch before it writes.
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

template <class Formats, int kDim>
cudaError_t launch_dim(const AttentionCall& call, int rows, cudaStream_t stream) {
  using T = Element16;
  const bool aligned = is_aligned<T>(call.query) && is_aligned<T>(call.out);
  const auto launch = [&](auto count) {
    constexpr int kRows = decltype(count)::value;
    return aligned ? launch_traits<RowsTraits<Formats, kDim, kRows, T, true>>(call, stream)
                   : launch_traits<RowsTraits<Formats, kDim, kRows, T, false>>(call, stream);
  };
  return rows == 32 ? launch(std::integral_constant<int, 32>{})
                    : launch(std::integral_constant<int, 64>{});
}
template <class Formats>
cudaError_t launch_formats(const AttentionCall& call, int rows, cudaStream_t stream) {
  return call.cache.k.head_dim == 64 ? launch_dim<Formats, 64>(call, rows, stream)
                                     : launch_dim<Formats, 128>(call, rows, stream);
}

}  // namespace

Status launch_many_rows(const AttentionCall& call, int rows, cudaStream_t stream) {
  return with_pair(call.cache.k.format, call.cache.v.format, [&](auto formats) {
    using Formats = decltype(formats);
    if constexpr (can_have_many_rows(formats)) {
      if constexpr (can_age(formats)) {
        if (call.seqs.young.data) {
          return to_status(launch_formats<AgedPair<Formats>>(call, rows, stream));
        }
      }
      return to_status(launch_formats<Formats>(call, rows, stream));
    } else {
      return Status::unsupported("the kernel for many query rows does not take these row formats");
    }
  });
}

}  // namespace kvquant::cuda
