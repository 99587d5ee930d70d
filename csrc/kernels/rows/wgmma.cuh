// The matrix products of a warpgroup on Hopper (sm_90a), which read shared memory by descriptors.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "common/cuda/ptx.cuh"

namespace kvquant::cuda {

// What this thread has written to shared memory is there for products and bulk copies.
__device__ __forceinline__ void publish_shared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
// Registers that products take are written; after it come the products.
__device__ __forceinline__ void begin_products() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void close_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kLeft>
__device__ __forceinline__ void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
}

// True in one lane of the warp, which the compiler then knows to be alone.
__device__ __forceinline__ bool is_elected() {
  uint32_t is = 0;
  asm volatile("{.reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p;}" : "=r"(is));
  return is != 0;
}
// A barrier in shared memory that counts arrivals and the bytes of bulk copies.
__device__ __forceinline__ void init_barrier(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}
// Makes new barriers known to the copy engine.
__device__ __forceinline__ void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
// Arrives, and has the barrier wait for these bytes too.
__device__ __forceinline__ void expect_bytes(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(barrier),
               "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void wait_barrier(uint32_t barrier, uint32_t phase) {
  asm volatile(
      "{.reg .pred p;\n"
      "WAIT: mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 p, [%0], %1;\n"
      "@p bra DONE;\nbra WAIT;\nDONE:}" ::"r"(barrier),
      "r"(phase)
      : "memory");
}
// Copies by the copy engine: of bytes that lie one after the other, and of a box of a block
// and head.
__device__ __forceinline__ void copy_bulk(uint32_t to, const void* from, int bytes,
                                          uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(to),
      "l"(from), "r"(bytes), "r"(barrier)
      : "memory");
}
__device__ __forceinline__ void copy_box(uint32_t to, const CUtensorMap& map, int x, int y,
                                         int head, int block, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(to),
      "l"(&map), "r"(barrier), "r"(x), "r"(y), "r"(head), "r"(block)
      : "memory");
}

// How rows of kRowBytes (64 or 128) lie in shared memory: each 16-byte piece at the place that the
// hardware's swizzle gives it, eight rows in an atom.
template <int kRowBytes>
struct Swizzle {
  static_assert(kRowBytes == 64 || kRowBytes == 128);

  static __device__ __forceinline__ int place(int row, int piece) {
    return row * kRowBytes + ((kRowBytes == 128 ? piece ^ (row & 7) : piece ^ (row >> 1 & 3)) << 4);
  }
  // `stride`: bytes between the halves of a matrix that is wider than a row.
  static __device__ __forceinline__ uint64_t descriptor(uint32_t address, uint32_t stride = 16) {
    constexpr uint64_t kMode = kRowBytes == 128 ? 1 : 2, kAtom = 8 * kRowBytes;
    return uint64_t((address & 0x3ffff) >> 4) | uint64_t(stride >> 4) << 16 | (kAtom >> 4) << 32 |
           kMode << 62;
  }
};

#define KVQUANT_REGISTERS_32                                                                \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23," \
  "%24,%25,%26,%27,%28,%29,%30,%31}"
#define KVQUANT_REGISTERS_64                                                                 \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,"  \
  "%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45," \
  "%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}"
#define KVQUANT_8(c, x, i) \
  c(x[i]), c(x[i + 1]), c(x[i + 2]), c(x[i + 3]), c(x[i + 4]), c(x[i + 5]), c(x[i + 6]), c(x[i + 7])
#define KVQUANT_32(c, x, i) \
  KVQUANT_8(c, x, i), KVQUANT_8(c, x, i + 8), KVQUANT_8(c, x, i + 16), KVQUANT_8(c, x, i + 24)

// Keeps the compiler from moving uses of results ahead of the wait for them.
__device__ __forceinline__ void keep(int (&x)[32]) {
  asm volatile("" : KVQUANT_32("+r", x, 0)::"memory");
}
__device__ __forceinline__ void keep(float (&x)[32]) {
  asm volatile("" : KVQUANT_32("+f", x, 0)::"memory");
}
__device__ __forceinline__ void keep(float (&x)[64]) {
  asm volatile("" : KVQUANT_32("+f", x, 0), KVQUANT_32("+f", x, 32)::"memory");
}

// c (64 x 64) = or, kAdds, += a (64 x kDim, signed bytes) b (64 x kDim, unsigned bytes)^T; begins
// and closes the products.
template <int kDim, bool kAdds>
__device__ __forceinline__ void multiply_query(int (&c)[32], uint64_t a, uint64_t b) {
  begin_products();
#pragma unroll
  for (int i = 0; i < kDim / 32; ++i) {
    asm volatile(
        "{.reg .pred p; setp.ne.b32 p, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.u8 " KVQUANT_REGISTERS_32 ", %32, %33, p;}"
        : KVQUANT_32("+r", c, 0)
        : "l"(a + 2 * i), "l"(b + 2 * i), "r"(int(kAdds || i > 0)));
  }
  close_products();
}
// c (64 x 64 or 128) += a (64 x 16, fp16, registers) b (16 rows of fp16).
__device__ __forceinline__ void multiply_halves(float (&c)[32], const uint4& a, uint64_t b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 " KVQUANT_REGISTERS_32
               ", {%32,%33,%34,%35}, %36, 1, 1, 1, 1;"
               : KVQUANT_32("+f", c, 0)
               : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "l"(b));
}
__device__ __forceinline__ void multiply_halves(float (&c)[64], const uint4& a, uint64_t b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 " KVQUANT_REGISTERS_64
               ", {%64,%65,%66,%67}, %68, 1, 1, 1, 1;"
               : KVQUANT_32("+f", c, 0), KVQUANT_32("+f", c, 32)
               : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "l"(b));
}

#undef KVQUANT_REGISTERS_32
#undef KVQUANT_REGISTERS_64
#undef KVQUANT_8
#undef KVQUANT_32

}  // namespace kvquant::cuda
