// The entry points of every instruction set, of which dispatch.cpp picks one.
#pragma once

#include "params.h"
#include "status.h"

#define KVQUANT_DECLARE_KERNELS(isa)                       \
  namespace kvquant::cpu::isa {                            \
  Status append(const AppendParams& params, int threads);  \
  Status attention(const AttentionParams&, int threads);   \
  Status gather(const GatherParams& params, int threads);  \
  Status quantize(const QuantizeParams&, int threads);     \
  Status dequantize(const DequantizeParams&, int threads); \
  Status qk_matmul(const MatmulParams&, int threads);      \
  Status pv_matmul(const MatmulParams&, int threads);      \
  }

KVQUANT_DECLARE_KERNELS(portable)
#if defined(__x86_64__)
KVQUANT_DECLARE_KERNELS(avx2)
KVQUANT_DECLARE_KERNELS(avx512)
#elif defined(__aarch64__)
KVQUANT_DECLARE_KERNELS(neon)
#endif
#undef KVQUANT_DECLARE_KERNELS
