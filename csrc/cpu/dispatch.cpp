// The choice of an instruction set, and the entry points that follow it.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "cpu/cpu.h"
#include "cpu/isa.h"

namespace kvquant::cpu {
namespace {

struct Kernels {
  const char* name;
  bool (*supported)();
  Status (*append)(const AppendParams&, int);
  Status (*attention)(const AttentionParams&, int);
  Status (*gather)(const GatherParams&, int);
  Status (*quantize)(const QuantizeParams&, int);
  Status (*dequantize)(const DequantizeParams&, int);
  Status (*qk_matmul)(const MatmulParams&, int);
  Status (*pv_matmul)(const MatmulParams&, int);
};

#ifdef KVQUANT_X86
// What KvquantCpuIsa.cmake compiles for. The builtin also asks whether the system saves the
// registers.
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni");
}
#endif

// Best first; the last runs everywhere.
constexpr Kernels kVariants[] = {
#ifdef KVQUANT_X86
    {"avx512", has_avx512, avx512::append, avx512::attention, avx512::gather, avx512::quantize,
     avx512::dequantize, avx512::qk_matmul, avx512::pv_matmul},
    {"avx2", has_avx2, avx2::append, avx2::attention, avx2::gather, avx2::quantize,
     avx2::dequantize, avx2::qk_matmul, avx2::pv_matmul},
#elif defined(__aarch64__)
    {"neon", [] { return true; }, neon::append, neon::attention, neon::gather, neon::quantize,
     neon::dequantize, neon::qk_matmul, neon::pv_matmul},
#endif
    {"portable", [] { return true; }, portable::append, portable::attention, portable::gather,
     portable::quantize, portable::dequantize, portable::qk_matmul, portable::pv_matmul},
};

// The best of those with this name (null: of all) that run here; null: none.
const Kernels* find(const char* name) {
  for (const Kernels& kernels : kVariants) {
    if ((!name || !std::strcmp(name, kernels.name)) && kernels.supported()) return &kernels;
  }
  return nullptr;
}

const Kernels* choose() {
#ifdef KVQUANT_X86
  __builtin_cpu_init();
#endif
  const char* name = std::getenv("KVQUANT_CPU_ISA");
  if (!name || !*name) return find(nullptr);
  if (const Kernels* kernels = find(name)) return kernels;
  const Kernels* best = find(nullptr);
  std::fprintf(stderr, "kvquant: KVQUANT_CPU_ISA=%s is not one that runs here; using %s\n", name,
               best->name);
  return best;
}

std::atomic<const Kernels*> active{choose()};
const Kernels& kernels() { return *active.load(std::memory_order_relaxed); }

}  // namespace

const char* isa() { return kernels().name; }

std::vector<const char*> isas() {
  std::vector<const char*> names;
  for (const Kernels& kernels : kVariants) {
    if (kernels.supported()) names.push_back(kernels.name);
  }
  return names;
}

bool force_isa(const char* name) {
  const Kernels* found = name ? find(name) : nullptr;
  if (found) active.store(found, std::memory_order_relaxed);
  return found;
}

Status append(const AppendParams& params, int threads) { return kernels().append(params, threads); }
Status attention(const AttentionParams& params, int threads) {
  return kernels().attention(params, threads);
}
Status gather(const GatherParams& params, int threads) { return kernels().gather(params, threads); }
Status quantize(const QuantizeParams& params, int threads) {
  return kernels().quantize(params, threads);
}
Status dequantize(const DequantizeParams& params, int threads) {
  return kernels().dequantize(params, threads);
}
Status qk_matmul(const MatmulParams& params, int threads) {
  return kernels().qk_matmul(params, threads);
}
Status pv_matmul(const MatmulParams& params, int threads) {
  return kernels().pv_matmul(params, threads);
}

}  // namespace kvquant::cpu
