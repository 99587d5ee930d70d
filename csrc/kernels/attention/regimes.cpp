#include "kernels/attention/regimes.h"

#include "kernels/attention/config.h"

namespace kvquant {
namespace {

constexpr int kMostDim = 256, kMostBlocks = 65535;

Refusal refuse_dims(const Problem& p) {
  for (const auto& [name, dim] :
       {std::pair{"head_dim", p.head_dim}, {"v_head_dim", p.v_head_dim}}) {
    if (dim > kMostDim || dim % 16) {
      return {"its " + std::string(name) + " " + std::to_string(dim) +
              " is no multiple of 16 up to " + std::to_string(kMostDim)};
    }
  }
  return {};
}

int capacity_of(const Problem& p) { return int(std::min<int64_t>(p.capacity, 1 << 30)); }

cuda::AttentionShape shape_of(const Problem& p) {
  return cuda::shape_attention(p.batch, p.max_seqlen_q, p.num_q_heads, p.num_kv_heads, p.head_dim,
                               p.v_head_dim, p.float32, capacity_of(p), p.multiprocessors);
}

// Split-KV flash attention on the tensor cores: decode, chunks and prompts.
Refusal refuse_split_kv(const Problem& p) {
  if (Refusal refusal = refuse_dims(p); !refusal.why.empty()) return refusal;
  if (p.num_kv_heads > kMostBlocks || p.batch > kMostBlocks) {
    return {"a batch or heads over " + std::to_string(kMostBlocks)};
  }
  const int64_t capacity = capacity_of(p), step = int64_t(cuda::kMinSplit) * cuda::kMaxSplits;
  if (p.split_size && capacity > int64_t(p.split_size) * cuda::kMaxSplits) {
    const int64_t least = (capacity + step - 1) / step * cuda::kMinSplit;
    return {std::to_string(p.split_size) + ", but a capacity of " + std::to_string(p.capacity) +
                " tokens would be more than " + std::to_string(cuda::kMaxSplits) +
                " splits: expected at least " + std::to_string(least),
            "split_size"};
  }
  const auto shape = shape_of(p);
  const auto plan = cuda::plan_attention(shape, p.batch, int(capacity), p.split_size);
  if (int64_t(shape.row_tiles) * plan.splits > INT32_MAX) {
    return {"more than 2^31 pieces of work: split the call"};
  }
  return {};
}

Schedule schedule_split_kv(const Problem& p) {
  const auto shape = shape_of(p);
  const auto plan = cuda::plan_attention(shape, p.batch, capacity_of(p), p.split_size);
  Schedule schedule;
  schedule.splits = plan.splits;
  // Blocks of one row tile do not wait for another's rows.
  schedule.appends = p.appends && !p.packed && shape.row_tiles == 1;
  schedule.partial_floats = plan.partial_floats;
  schedule.counters = plan.counters;
  schedule.query_rows = shape.rows;
  schedule.warps = shape.instance.warps;
  schedule.blocks = shape.instance.blocks;
  schedule.stages = shape.instance.stages;
  schedule.head_dim = shape.head_dim;
  schedule.one_block_per_sm = shape.one_block_per_sm;
  return schedule;
}

Schedule schedule_cpu(const Problem&) { return {}; }

}  // namespace

Choice choose(const Problem& problem, const std::vector<Regime>& rows) {
  Choice choice;
  for (const Regime& row : rows) {
    Refusal refusal = row.refuses(problem);
    if (refusal.why.empty()) {
      choice.row = int(&row - rows.data());
      choice.name = row.name;
      choice.schedule = row.schedule(problem);
      return choice;
    }
    choice.refusals.push_back(std::move(refusal));
  }
  return choice;
}

const std::vector<Regime>& cuda_regimes() {
  static const std::vector<Regime> rows{{"split_kv", refuse_split_kv, schedule_split_kv}};
  return rows;
}

const std::vector<Regime>& cpu_regimes() {
  static const std::vector<Regime> rows{{"flash", refuse_dims, schedule_cpu}};
  return rows;
}

}  // namespace kvquant
