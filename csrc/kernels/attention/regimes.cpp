#include "kernels/attention/regimes.h"

#include "common/age.h"
#include "formats/formats.h"
#include "kernels/attention/config.h"
#include "kernels/rows/config.h"

namespace kvquant {
namespace {

constexpr int kMostDim = 256, kMostBlocks = 65535;
// A build without CUDA answers as one for all GPUs would.
#if defined(KVQUANT_WITH_CUDA) && !defined(KVQUANT_WITH_SM90A)
constexpr bool kHasSm90a = false;
#else
constexpr bool kHasSm90a = true;
#endif

Refusal refuse_view(const Problem& p) {
  return {refuse_rows(name_of(p.k_format), name_of(p.v_format), p.head_dim, p.v_head_dim)};
}

int capacity_of(const Problem& p) { return int(std::min<int64_t>(p.capacity, 1 << 30)); }

cuda::AttentionShape shape_of(const Problem& p) {
  return cuda::shape_attention(p.batch, p.max_seqlen_q, p.num_q_heads, p.num_kv_heads, p.head_dim,
                               p.v_head_dim, p.age_group > 0, p.float32, capacity_of(p),
                               p.split_size, p.multiprocessors);
}

cuda::AttentionPlan plan_of(const Problem& p, const cuda::AttentionShape& shape) {
  return cuda::plan_attention(shape, p.batch, capacity_of(p), code_bits(p.k_format, p.v_format),
                              p.split_size);
}

// Split-KV flash attention on the tensor cores: decode, chunks and prompts.
Refusal refuse_split_kv(const Problem& p) {
  if (Refusal refusal = refuse_view(p); !refusal.why.empty()) return refusal;
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
  if (int64_t(shape_of(p).row_tiles) * p.num_kv_heads > INT32_MAX) {
    return {"more than 2^31 pieces of work: split the call"};
  }
  return {};
}

Schedule schedule_of(const cuda::AttentionShape& shape, const cuda::AttentionPlan& plan) {
  Schedule schedule;
  schedule.splits = plan.splits;
  schedule.partial_floats = plan.partial_floats;
  schedule.counters = plan.counters;
  schedule.query_rows = shape.rows;
  schedule.warps = shape.instance.warps;
  schedule.blocks = shape.instance.blocks;
  schedule.stages = shape.instance.stages;
  schedule.head_dim = shape.head_dim;
  return schedule;
}

Schedule schedule_split_kv(const Problem& p) {
  const auto shape = shape_of(p);
  Schedule schedule = schedule_of(shape, plan_of(p, shape));
  // Blocks of one row tile do not wait for another's rows. By age, rows of a group that begins in
  // the call are not old when it is over, if groups are long enough.
  schedule.appends = p.appends && !p.packed && shape.row_tiles == 1 &&
                     (!p.age_group || p.age_group >= kSpareTokens);
  return schedule;
}

cuda::AttentionShape many_rows_shape_of(const Problem& p) {
  return cuda::shape_many_rows(p.batch, p.max_seqlen_q, p.num_q_heads, p.num_kv_heads, p.head_dim,
                               p.multiprocessors);
}

// Many query rows on Hopper: chunks, and steps of several query tokens.
Refusal refuse_many_rows(const Problem& p) {
  if (Refusal refusal = refuse_split_kv(p); !refusal.why.empty()) return refusal;
  if (!kHasSm90a) return {"this build has no code for sm_90a"};
  if (p.capability != 90) {
    const std::string minor = std::to_string(p.capability % 10);
    return {"compute capability " + std::to_string(p.capability / 10) + "." + minor + ", not 9.0"};
  }
  bool is_served = false;
  with_pair(p.k_format, p.v_format, [&](auto pair) {
    is_served = cuda::can_have_many_rows(pair);
    return Status::ok();
  });
  if (!is_served) {
    return {std::string("keys in ") + name_of(p.k_format) + " with values in " +
            name_of(p.v_format)};
  }
  if (p.head_dim != p.v_head_dim || (p.head_dim != 64 && p.head_dim != 128)) {
    return {"head_dims other than 64 and 128"};
  }
  if (p.float32) return {"float32"};
  if (p.mean_group && p.mean_group < cuda::kRowsTile) {
    return {"key means of fewer than " + std::to_string(cuda::kRowsTile) + " tokens"};
  }
  if (p.age_group && p.age_group < cuda::kRowsTile) {
    return {"rows by age in groups of fewer than " + std::to_string(cuda::kRowsTile) + " tokens"};
  }
  const int64_t rows = int64_t(p.max_seqlen_q) * (p.num_q_heads / p.num_kv_heads);
  const int fewest = cuda::fewest_rows(p.max_seqlen_q, p.age_group > 0);
  if (rows < fewest) {
    return {std::to_string(rows) + " query rows of a KV head, fewer than " +
            std::to_string(fewest)};
  }
  return {};
}

Schedule schedule_many_rows(const Problem& p) {
  const auto shape = many_rows_shape_of(p);
  const auto plan = plan_of(p, shape);
  Schedule schedule = schedule_of(shape, plan);
  schedule.kernel = AttentionKernel::kManyRows;
  // In two launches: the attention reads stored rows while the append writes new ones.
  schedule.appends = p.appends && !p.packed && p.max_seqlen_q <= kSpareTokens;
  return schedule;
}

Schedule schedule_cpu(const Problem&) { return {}; }

}  // namespace

std::string refuse_rows(std::string_view k_format, std::string_view v_format, int head_dim,
                        int v_head_dim) {
  const std::string keys(k_format), values(v_format);
  RowFormat tags[2];
  if (!find_format(RowFormats{}, k_format, tags[0])) return "this build has no row format " + keys;
  if (!find_format(RowFormats{}, v_format, tags[1]))
    return "this build has no row format " + values;
  const auto serves = [](auto) { return Status::ok(); };
  if (with_pair(tags[0], tags[1], serves).code != Status::kOk) {
    return "this build has no kernels for keys in " + keys + " with values in " + values;
  }
  for (const auto& [name, dim] : {std::pair{"head_dim", head_dim}, {"v_head_dim", v_head_dim}}) {
    if (dim > kMostDim || dim % 16) {
      return "its " + std::string(name) + " " + std::to_string(dim) +
             " is no multiple of 16 up to " + std::to_string(kMostDim);
    }
  }
  return {};
}

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
    const bool is_known = !choice.refusals.empty() && choice.refusals.back().why == refusal.why;
    if (!is_known) choice.refusals.push_back(std::move(refusal));
  }
  return choice;
}

const std::vector<Regime>& cuda_regimes() {
  static const std::vector<Regime> rows{{"many_rows", refuse_many_rows, schedule_many_rows},
                                        {"split_kv", refuse_split_kv, schedule_split_kv}};
  return rows;
}

const std::vector<Regime>& cpu_regimes() {
  static const std::vector<Regime> rows{{"flash", refuse_view, schedule_cpu}};
  return rows;
}

}  // namespace kvquant
