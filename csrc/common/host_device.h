// Functions that the CPU's code and CUDA's share: one text, inlined everywhere.
#pragma once

#ifdef __CUDACC__
#include <cuda_fp16.h>
#define KVQUANT_HD __host__ __device__ __forceinline__
#else
#define KVQUANT_HD KVQUANT_INLINE
#endif
// Always: an out-of-line copy compiled for AVX-512 could be the one that the linker keeps for all.
#define KVQUANT_INLINE inline __attribute__((always_inline))

namespace kvquant {

template <class T>
KVQUANT_HD constexpr T least(T a, T b) {
#ifdef __CUDA_ARCH__
  return min(a, b);
#else
  return b < a ? b : a;
#endif
}
template <class T>
KVQUANT_HD constexpr T most(T a, T b) {
#ifdef __CUDA_ARCH__
  return max(a, b);
#else
  return a < b ? b : a;
#endif
}

}  // namespace kvquant
