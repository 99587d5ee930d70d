// Which instance of the attention kernel a call takes.
#include <atomic>

#include "formats/formats.h"
#include "kernels/attention/call.h"
#include "kernels/attention/config.h"
#include "kernels/device.cuh"
#include "kernels/rows/config.h"

namespace kvquant::cuda {

template <class Formats, int kDim>
cudaError_t launch_dim(const AttentionCall&, int rows, Occupancy, cudaStream_t);
Status launch_many_rows(const AttentionCall&, int rows, cudaStream_t);

namespace {

// Asked once a device.
int multiprocessors(int device) {
  constexpr int kDevices = 64;
  static std::atomic<int> known[kDevices];
  if (device >= kDevices) return 1;
  int count = known[device];
  if (count == 0 &&
      cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) == cudaSuccess) {
    known[device] = count;
  }
  return std::max(1, count);
}

int capacity_of(const Sequences& seqs, const CacheView& cache) {
  return int(std::min<int64_t>(int64_t(seqs.max_blocks) * cache.block_size, 1 << 30));
}

bool is_by_age(const AttentionParams& p) { return p.seqs.young.data; }

AttentionShape shape_of(const AttentionParams& p, int device) {
  return shape_attention(p.seqs.batch, p.seqs.max_seqlen_q, p.num_q_heads, p.cache.num_kv_heads,
                         p.cache.k.head_dim, p.cache.v.head_dim, is_by_age(p),
                         p.dtype == Dtype::kFloat32, capacity_of(p.seqs, p.cache), p.split_size,
                         multiprocessors(device));
}

template <class Formats>
Status launch_pair(const AttentionCall& call, const AttentionShape& shape, cudaStream_t stream) {
  const auto launch = [&](auto of) {
    return to_status(of(call, shape.rows, shape.occupancy, stream));
  };
  switch (shape.head_dim) {
    case 64:
      return launch(launch_dim<Formats, 64>);
    case 128:
      return launch(launch_dim<Formats, 128>);
    case 192:
      return launch(launch_dim<Formats, 192>);
    case 256:
      return launch(launch_dim<Formats, 256>);
  }
  return Status::unsupported("head_dim over 256");
}

AttentionShape many_rows_shape_of(const AttentionParams& p, int device) {
  return shape_many_rows(p.seqs.batch, p.seqs.max_seqlen_q, p.num_q_heads, p.cache.num_kv_heads,
                         p.cache.k.head_dim, multiprocessors(device));
}

Status launch_shape(AttentionCall call, const AttentionShape& shape, Launch launch) {
  if (call.cache.num_kv_heads > 65535 || call.seqs.batch > 65535) {
    return Status::unsupported("batch or heads over 65535");
  }
  if (int64_t(shape.row_tiles) * call.cache.num_kv_heads > INT32_MAX) {
    return Status::unsupported("more than 2^31 pieces of work: split the call");
  }
  const DeviceGuard guard(launch.device);
  if (guard.error() != cudaSuccess) return to_status(guard.error());
  call.gqa_group_size = Divisor::of(call.num_q_heads / call.cache.num_kv_heads);
  call.divided_by = Divisor::of(call.splits);
  call.row_tiles = shape.row_tiles;
  call.k_codes = Strided::of(call.cache.k.codes), call.k_params = Strided::of(call.cache.k.params);
  call.v_codes = Strided::of(call.cache.v.codes), call.v_params = Strided::of(call.cache.v.params);
  const int capacity = capacity_of(call.seqs, call.cache);
  const int even = split_length(capacity, call.splits, shape.instance.step());
  call.min_split = call.split_size > 0 ? call.split_size
                   : shape.fills       ? std::max(kMinSplit, even)
                                       : kMinSplit;
  const auto stream = static_cast<cudaStream_t>(launch.stream);
  if (call.kernel == AttentionKernel::kManyRows) {
#ifdef KVQUANT_WITH_SM90A
    return launch_many_rows(call, shape.rows, stream);
#else
    return Status::unsupported("this build has no code for sm_90a");
#endif
  }
  return with_pair(call.cache.k.format, call.cache.v.format, [&](auto formats) {
    using Formats = decltype(formats);
    if constexpr (can_age(formats)) {
      if (is_by_age(call)) return launch_pair<AgedPair<Formats>>(call, shape, stream);
    }
    return launch_pair<Formats>(call, shape, stream);
  });
}

}  // namespace

Status attention(const AttentionParams& p, Launch launch) {
  if (p.seqs.batch == 0 || p.seqs.max_seqlen_q == 0) return Status::ok();
  const bool many_rows = p.kernel == AttentionKernel::kManyRows;
  const auto shape = many_rows ? many_rows_shape_of(p, launch.device) : shape_of(p, launch.device);
  return launch_shape({p}, shape, launch);
}

Status attend(const AppendParams& append, const AttentionParams& p, Launch launch) {
  if (p.seqs.batch == 0 || p.seqs.max_seqlen_q == 0) return Status::ok();
  AttentionCall call{p};
  call.key = append.key;
  call.value = append.value;
  call.advance = append.advance;
  if (p.kernel == AttentionKernel::kManyRows) {
    AppendParams rows = append;
    rows.advance = nullptr;  // the attention's launch does
    const Status status = cuda::append(rows, launch);
    if (status.code != Status::kOk) return status;
    return launch_shape(call, many_rows_shape_of(p, launch.device), launch);
  }
  const AttentionShape shape = shape_of(p, launch.device);
  // Blocks of one row tile do not wait for another's rows: a call of more is two launches.
  if (shape.row_tiles > 1) {
    const Status status = cuda::append(append, launch);
    return status.code == Status::kOk ? launch_shape({p}, shape, launch) : status;
  }
  return launch_shape(call, shape, launch);
}

}  // namespace kvquant::cuda
