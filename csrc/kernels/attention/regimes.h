// Which kernel serves an attention call: pure functions of numbers, tested without a GPU. A kernel
// is a row: a name, why it refuses a problem, and the schedule of those that it takes.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "params.h"

namespace kvquant {

// All that a choice may depend on, and nothing that changes as the text grows.
struct Problem {
  int32_t batch, max_seqlen_q, num_q_heads, num_kv_heads, head_dim, v_head_dim;
  int64_t capacity;    // of the block table, in tokens
  int32_t split_size;  // 0: as the sizes ask for
  RowFormat k_format, v_format;
  int32_t mean_group;
  int32_t age_group;  // tokens of a group, of rows by age (common/age.h); 0: not by age
  bool float32, packed, appends;
  int32_t multiprocessors;  // 0: a CPU
  int32_t capability;       // of a CUDA device: 90 is 9.0
};

// What a launch needs beside its parameters; explain prints it.
struct Schedule {
  AttentionKernel kernel = AttentionKernel::kSplitKv;
  int32_t splits = 1;    // most of a sequence
  bool appends = false;  // it takes the call's new rows along; else their append goes before it
  int64_t partial_floats = 0, counters = 0;                                 // of the workspace
  int32_t query_rows = 0, warps = 0, blocks = 0, stages = 0, head_dim = 0;  // of its instance
};

// Why a row does not serve a problem; empty: it does. `argument`: the caller's that no kernel can
// honour, which is an error then; null: another backend may serve the call.
struct Refusal {
  std::string why;
  const char* argument = nullptr;
};

// Why no kernel serves rows of these formats and widths; empty: all do.
std::string refuse_rows(std::string_view k_format, std::string_view v_format, int head_dim,
                        int v_head_dim);

struct Regime {
  const char* name;
  Refusal (*refuses)(const Problem&);
  Schedule (*schedule)(const Problem&);
};

// The first row that serves the problem, -1: none; and why those before it do not, each reason
// once.
struct Choice {
  int row = -1;
  const char* name = nullptr;
  Schedule schedule;
  std::vector<Refusal> refusals;
};
Choice choose(const Problem&, const std::vector<Regime>&);

// The rows of a CUDA device, and those of a CPU, in the order in which they are asked.
const std::vector<Regime>& cuda_regimes();
const std::vector<Regime>& cpu_regimes();

}  // namespace kvquant
