// Which instance of the attention kernel a call takes.
#include "kernels/attention/config.h"
#include "kernels/common/device.cuh"

namespace kvquant::cuda {

template <int kDim>
cudaError_t launch_dim(const AttentionParams&, const AttentionPlan&, cudaStream_t);

Status attention(const AttentionParams& p, Launch launch) {
  const CacheView& cache = p.cache;
  if (p.seqs.batch == 0 || p.seqs.tokens == 0) return Status::ok();
  const DeviceGuard guard(launch.device);
  if (guard.error() != cudaSuccess) return to_status(guard.error());
  // The caller sized splits and scratch from the same plan; here it gives the instance's shape.
  const AttentionPlan plan =
      plan_attention(p.seqs.batch, p.seqs.tokens, p.q_heads, cache.kv_heads, cache.k_dim,
                     cache.v_dim, p.dtype == Dtype::kFloat32, p.seqs.max_blocks * cache.block_size,
                     1, shared_memory_limit(launch.device));
  if (plan.splits == 0)
    return Status::unsupported("head_dim too large for this GPU's shared memory");
  if ((plan.counters - 1) * p.splits > INT32_MAX) {
    return Status::unsupported("more than 2^31 pieces of work: split the batch");
  }
  const auto stream = static_cast<cudaStream_t>(launch.stream);
  switch (plan.head_dim) {
    case 64:
      return to_status(launch_dim<64>(p, plan, stream));
    case 128:
      return to_status(launch_dim<128>(p, plan, stream));
    case 192:
      return to_status(launch_dim<192>(p, plan, stream));
    case 256:
      return to_status(launch_dim<256>(p, plan, stream));
  }
  return Status::unsupported("head_dim over 256");
}

}  // namespace kvquant::cuda
