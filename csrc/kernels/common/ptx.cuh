// The instructions that CUDA C++ has no name for.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

namespace kvquant::cuda {

// Sixteen bytes from global to shared memory, in the background; zeros where `there` is false.
__device__ __forceinline__ void copy16_async(void* to, const void* from, bool there) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(
                   uint32_t(__cvta_generic_to_shared(to))),
               "l"(from), "r"(there ? 16 : 0)
               : "memory");
#else
  *static_cast<uint4*>(to) = there ? *static_cast<const uint4*>(from) : make_uint4(0, 0, 0, 0);
#endif
}
__device__ __forceinline__ void commit_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Waits until at most `pending` of this thread's latest groups are on their way.
__device__ __forceinline__ void wait_copies(int pending) {
#if __CUDA_ARCH__ >= 800
  if (pending >= 3) {
    asm volatile("cp.async.wait_group 3;" ::: "memory");
  } else if (pending == 2) {
    asm volatile("cp.async.wait_group 2;" ::: "memory");
  } else if (pending == 1) {
    asm volatile("cp.async.wait_group 1;" ::: "memory");
  } else {
    asm volatile("cp.async.wait_group 0;" ::: "memory");
  }
#endif
}

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ int add_acquire_release(int* p, int value) {
  int before;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(p), "r"(value)
               : "memory");
  return before;
}

// c += a b for fp16 a (16 x 16, rows) and b (16 x 8, columns), fp32 c. sm_75 has the instruction
// for half the depth only.
__device__ __forceinline__ void mma_16816(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                          uint32_t b1) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  const uint32_t b[2] = {b0, b1};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
        "{%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[2 * half]), "r"(a[2 * half + 1]), "r"(b[half]));
  }
#endif
}

// Codes to fp16: a byte q becomes 0x6400 + q, which is 1024 + q.
__device__ __forceinline__ uint32_t codes_low(uint32_t word) {
  return __byte_perm(word, 0x64646464u, 0x4140);
}
__device__ __forceinline__ uint32_t codes_high(uint32_t word) {
  return __byte_perm(word, 0x64646464u, 0x4342);
}
constexpr float kCodeBias = 1024.f;

__device__ __forceinline__ uint32_t half2_bits(__half2 x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  return u;
}
__device__ __forceinline__ float2 half2_floats(uint32_t u) {
  __half2 h;
  memcpy(&h, &u, 4);
  return __half22float2(h);
}

}  // namespace kvquant::cuda
