// The CPU kernels' entry points: the ISA is chosen once, at load. `threads` is the caller's limit.
#pragma once

#include <vector>

#include "params.h"
#include "status.h"

namespace kvquant::cpu {

const char* isa();  // "avx512", "avx2", "neon" or "portable": what the calls below run
std::vector<const char*> isas();   // those that run here, best first
bool force_isa(const char* name);  // false if this machine or build lacks it

Status append(const AppendParams& params, int threads);
Status attention(const AttentionParams& params, int threads);
Status gather(const GatherParams& params, int threads);
Status quantize(const QuantizeParams& params, int threads);
Status dequantize(const DequantizeParams& params, int threads);
Status qk_matmul(const MatmulParams& params, int threads);
Status pv_matmul(const MatmulParams& params, int threads);

}  // namespace kvquant::cpu
