// The instructions that CUDA C++ has no name for.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace kvquant::cuda {

// Waits for what the launch before has written. Nothing that it writes may be touched ahead of it.
__device__ __forceinline__ void wait_for_writes() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// Lets the next launch of the stream start its blocks as this one's leave room for them, once each
// block has called it.
__device__ __forceinline__ void let_next_launch_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
// Both: nothing in memory may be touched ahead of it.
__device__ __forceinline__ void wait_for_previous_launch() {
  wait_for_writes();
  let_next_launch_start();
}

// Bytes that are read once. Not through the read-only path: the same launch may have written them.
template <class T>
__device__ __forceinline__ T load_stream(const void* p);
template <>
__device__ __forceinline__ uint4 load_stream<uint4>(const void* p) {
  uint4 u;
  asm volatile("ld.global.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(u.x), "=r"(u.y), "=r"(u.z), "=r"(u.w)
               : "l"(p));
  return u;
}
template <>
__device__ __forceinline__ uint2 load_stream<uint2>(const void* p) {
  uint2 u;
  asm volatile("ld.global.L1::no_allocate.L2::128B.v2.u32 {%0,%1}, [%2];"
               : "=r"(u.x), "=r"(u.y)
               : "l"(p));
  return u;
}
template <>
__device__ __forceinline__ uint32_t load_stream<uint32_t>(const void* p) {
  uint32_t u;
  asm volatile("ld.global.L1::no_allocate.L2::128B.u32 %0, [%1];" : "=r"(u) : "l"(p));
  return u;
}
// Bytes whose cache line other warps need too.
template <class T = uint4>
__device__ __forceinline__ T load_keep(const void* p);
template <>
__device__ __forceinline__ uint4 load_keep<uint4>(const void* p) {
  uint4 u;
  asm volatile("ld.global.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(u.x), "=r"(u.y), "=r"(u.z), "=r"(u.w)
               : "l"(p));
  return u;
}
template <>
__device__ __forceinline__ uint2 load_keep<uint2>(const void* p) {
  uint2 u;
  asm volatile("ld.global.v2.u32 {%0,%1}, [%2];" : "=r"(u.x), "=r"(u.y) : "l"(p));
  return u;
}
__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return uint32_t(__cvta_generic_to_shared(p));
}
// Read where this stands, however often: the compiler would take what loops need to registers.
template <class T = uint4>
__device__ __forceinline__ T load_shared(uint32_t address);
template <>
__device__ __forceinline__ uint2 load_shared<uint2>(uint32_t address) {
  uint2 u;
  asm volatile("ld.volatile.shared.v2.u32 {%0,%1}, [%2];" : "=r"(u.x), "=r"(u.y) : "r"(address));
  return u;
}
template <>
__device__ __forceinline__ uint4 load_shared<uint4>(uint32_t address) {
  uint4 u;
  asm volatile("ld.volatile.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(u.x), "=r"(u.y), "=r"(u.z), "=r"(u.w)
               : "r"(address));
  return u;
}
__device__ __forceinline__ float load_shared_float(uint32_t address) {
  float x;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(address));
  return x;
}
// A piece of a row, from shared memory or from global.
template <class T, bool kShared>
__device__ __forceinline__ T load_piece(const uint8_t* p) {
  if constexpr (kShared) {
    return *reinterpret_cast<const T*>(p);
  } else {
    return load_stream<T>(p);
  }
}
// This lane's number, which the assembler has to keep in a register: it would work it out anew at
// each use, but does not know where a shuffle's result comes from.
__device__ __forceinline__ uint32_t kept(uint32_t x) { return __shfl_xor_sync(0xffffffffu, x, 0); }
// A word, asked for where this stands: the compiler would move an ordinary load to its use.
__device__ __forceinline__ int load_early(const int* p) {
  int x;
  asm volatile("ld.global.u32 %0, [%1];" : "=r"(x) : "l"(p));
  return x;
}
// A word of a kernel's parameters, which are __grid_constant__.
__device__ __forceinline__ uint32_t load_parameter(const void* parameters, uint32_t offset) {
  uint32_t x;
  asm volatile("ld.param.u32 %0, [%1];"
               : "=r"(x)
               : "l"(__cvta_generic_to_grid_constant(parameters) + offset));
  return x;
}
// Copies kBytes (4, 8 or 16) to shared memory, not waited for. Copies belong to the group that
// their thread closes next. sm_75 copies at once.
template <int kBytes>
__device__ __forceinline__ void copy_async(void* to, const void* from) {
#if __CUDA_ARCH__ >= 800
  const auto at = uint32_t(__cvta_generic_to_shared(to));
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(at), "l"(from));
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(at), "l"(from), "n"(kBytes));
  }
#else
  memcpy(__builtin_assume_aligned(to, kBytes), __builtin_assume_aligned(from, kBytes), kBytes);
#endif
}
__device__ __forceinline__ void close_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Waits for this thread's groups but the latest `left`, at most kMost.
template <int kMost>
__device__ __forceinline__ void wait_copies(int left) {
#if __CUDA_ARCH__ >= 800
  if constexpr (kMost > 0) {
    if (left < kMost) return wait_copies<kMost - 1>(left);
  }
  asm volatile("cp.async.wait_group %0;" ::"n"(kMost) : "memory");
#endif
}
// kCount elements in one access.
template <int kCount, class T>
__device__ __forceinline__ void store_vector(T* p, const T* x) {
  constexpr int kBytes = kCount * sizeof(T);
  using Byte = std::conditional_t<kBytes == 2, uint16_t, uint8_t>;
  using Short = std::conditional_t<kBytes == 4, uint32_t, Byte>;
  using Word =
      std::conditional_t<kBytes == 16, uint4, std::conditional_t<kBytes == 8, uint2, Short>>;
  static_assert(sizeof(Word) == kBytes);
  Word word;
  memcpy(&word, x, kBytes);
  *reinterpret_cast<Word*>(p) = word;
}

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// a * b + c in one instruction, where the compiler would add an address last.
__device__ __forceinline__ const uint8_t* offset_by(const uint8_t* c, uint32_t a, uint32_t b) {
  const uint8_t* sum;
  asm("mad.wide.u32 %0, %1, %2, %3;" : "=l"(sum) : "r"(a), "r"(b), "l"(c));
  return sum;
}

// A word of memory that nobody writes meanwhile, its address worked out in one instruction. What
// keeps it behind wait_for_previous_launch() is its index alone, which has to come from something
// that load_early() has read.
__device__ __forceinline__ int load_word(const int* p, uint32_t index) {
  int x;
  asm("ld.global.u32 %0, [%1];"
      : "=r"(x)
      : "l"(offset_by(reinterpret_cast<const uint8_t*>(p), index, 4)));
  return x;
}

// To about 1e-6 absolute.
__device__ __forceinline__ float tanh_approx(float x) {
  const float e = exp2_approx(fabsf(x) * -2.8853900817779268f);  // exp(-2 |x|)
  return copysignf(__fdividef(1.f - e, 1.f + e), x);
}

// Floats that one block leaves for another, 2 or 4 at a time. Each word says by itself whether it
// has arrived, so that neither side waits for an order of accesses.
constexpr uint32_t kNothing = 0xffffffffu;  // a NaN that no arithmetic results in
template <int kCount>
__device__ __forceinline__ void leave_floats(float* p, const float* x) {
  static_assert(kCount == 2 || kCount == 4);
  if constexpr (kCount == 4) {
    asm volatile("st.relaxed.gpu.global.v4.f32 [%0], {%1,%2,%3,%4};" ::"l"(p), "f"(x[0]), "f"(x[1]),
                 "f"(x[2]), "f"(x[3])
                 : "memory");
  } else {
    asm volatile("st.relaxed.gpu.global.v2.f32 [%0], {%1,%2};" ::"l"(p), "f"(x[0]), "f"(x[1])
                 : "memory");
  }
}
template <int kCount>
__device__ __forceinline__ void look_at_floats(const float* p, float* x) {
  static_assert(kCount == 2 || kCount == 4);
  if constexpr (kCount == 4) {
    asm volatile("ld.relaxed.gpu.global.v4.f32 {%0,%1,%2,%3}, [%4];"
                 : "=f"(x[0]), "=f"(x[1]), "=f"(x[2]), "=f"(x[3])
                 : "l"(p)
                 : "memory");
  } else {
    asm volatile("ld.relaxed.gpu.global.v2.f32 {%0,%1}, [%2];"
                 : "=f"(x[0]), "=f"(x[1])
                 : "l"(p)
                 : "memory");
  }
}

// c += a b for fp16 a (16 x 16, rows) and b (16 x 8, columns), fp32 c. sm_75 has the instruction
// for half the depth only.
__device__ __forceinline__ void mma_16816(float (&c)[4], const uint4& a, uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
#else
  const uint32_t low[2] = {a.x, a.z}, high[2] = {a.y, a.w}, b[2] = {b0, b1};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
        "{%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(low[half]), "r"(high[half]), "r"(b[half]));
  }
#endif
}

// c += a b for signed a (16 x 32, rows) and unsigned b (32 x 8, columns), bytes. sm_75 has the
// instruction for half the depth and height only.
__device__ __forceinline__ void mma_16832(int (&c)[4], const uint4& a, uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.u8.s32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
#else
  const uint32_t rows[4] = {a.x, a.y, a.z, a.w}, b[2] = {b0, b1};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    asm volatile("mma.sync.aligned.m8n8k16.row.col.s32.s8.u8.s32 {%0,%1}, {%2}, {%3}, {%0,%1};"
                 : "+r"(c[i % 2 * 2]), "+r"(c[i % 2 * 2 + 1])
                 : "r"(rows[i]), "r"(b[i / 2]));
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
// Codes to fp16 subnormals: a byte q becomes q 2^-24.
__device__ __forceinline__ uint32_t tiny_low(uint32_t word) { return __byte_perm(word, 0, 0x4140); }
__device__ __forceinline__ uint32_t tiny_high(uint32_t word) {
  return __byte_perm(word, 0, 0x4342);
}
__device__ __forceinline__ uint32_t mul_halves(uint32_t a, uint32_t b) {
  uint32_t x;
  asm("mul.f16x2 %0, %1, %2;" : "=r"(x) : "r"(a), "r"(b));
  return x;
}
__device__ __forceinline__ uint32_t sub_halves(uint32_t a, uint32_t b) {
  uint32_t x;
  asm("sub.f16x2 %0, %1, %2;" : "=r"(x) : "r"(a), "r"(b));
  return x;
}
// 1024 + q to q - 128, exactly.
__device__ __forceinline__ uint32_t centered(uint32_t codes) {
  return sub_halves(codes, 0x64806480u);
}

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

// The larger of both pairs of halves; a NaN counts as the smaller one.
__device__ __forceinline__ uint32_t max_halves(uint32_t a, uint32_t b) {
#if __CUDA_ARCH__ >= 800
  uint32_t most;
  asm("max.f16x2 %0, %1, %2;" : "=r"(most) : "r"(a), "r"(b));
  return most;
#else
  const float2 x = half2_floats(a), y = half2_floats(b);
  return half2_bits(__floats2half2_rn(fmaxf(x.x, y.x), fmaxf(x.y, y.y)));
#endif
}

}  // namespace kvquant::cuda
