// Elements of the three input types as float, sixteen channels at a time.
//
// Kernels that are not made of conversions take both types of 16 bits as one, and are compiled once
// for them: their elements are Element16, and the tensor's dtype goes along.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/cuda/ptx.cuh"
#include "params.h"

namespace kvquant::cuda {

constexpr int kLaneChannels = 16;  // a lane's share of a row: 16 codes are one 16-byte store

// fp16 or bf16, as a dtype says.
struct Element16 {
  uint16_t bits;
};
// What stands for T in kernels that take both types of 16 bits as one.
template <class T>
using Sized = std::conditional_t<sizeof(T) == 2, Element16, T>;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// Calls f with a value of the type that T's elements have.
template <class T, class F>
__device__ __forceinline__ auto with_type(Dtype dtype, F&& f) {
  if constexpr (!std::is_same_v<T, Element16>) {
    return f(T{});
  } else {
    return dtype == Dtype::kBFloat16 ? f(__nv_bfloat16{}) : f(__half{});
  }
}
template <class T>
__device__ __forceinline__ float to_float(T x, Dtype dtype) {
  return with_type<T>(dtype, [&](auto y) {
    memcpy(&y, &x, sizeof(x));
    return to_float(y);
  });
}
template <class T>
__device__ __forceinline__ T from_float(float x, Dtype dtype) {
  return with_type<T>(dtype, [&](auto y) {
    y = from_float<decltype(y)>(x);
    T z;
    memcpy(&z, &y, sizeof(z));
    return z;
  });
}

// One element of a tensor whose type is known at run time.
__device__ __forceinline__ float load_element(const void* base, int64_t index, Dtype dtype) {
  if (dtype == Dtype::kFloat16) return to_float(static_cast<const __half*>(base)[index]);
  if (dtype == Dtype::kBFloat16) return to_float(static_cast<const __nv_bfloat16*>(base)[index]);
  return static_cast<const float*>(base)[index];
}
__device__ __forceinline__ void store_element(void* base, int64_t index, Dtype dtype, float x) {
  if (dtype == Dtype::kFloat16) {
    static_cast<__half*>(base)[index] = from_float<__half>(x);
  } else if (dtype == Dtype::kBFloat16) {
    static_cast<__nv_bfloat16*>(base)[index] = from_float<__nv_bfloat16>(x);
  } else {
    static_cast<float*>(base)[index] = x;
  }
}

// Sixteen neighbouring elements as they come from memory.
template <class T>
struct Words16 {
  static constexpr int kPer = 16 / sizeof(T);
  uint4 words[kLaneChannels / kPer];

  __device__ __forceinline__ float operator[](int i) const {
    T x[kPer];
    memcpy(x, &words[i / kPer], 16);
    return to_float(x[i % kPer]);
  }
  __device__ __forceinline__ void read(float (&x)[kLaneChannels], Dtype dtype) const {
    with_type<T>(dtype, [&](auto type) {
      Words16<decltype(type)> typed;
      memcpy(&typed, this, sizeof(typed));
#pragma unroll
      for (int i = 0; i < kLaneChannels; ++i) x[i] = typed[i];
    });
  }
};
// In 16-byte accesses where the address allows.
template <class T>
__device__ __forceinline__ Words16<T> load_words16(const T* p) {
  constexpr int kPer = Words16<T>::kPer;
  const bool aligned = reinterpret_cast<uintptr_t>(p) % 16 == 0;
  Words16<T> x;
#pragma unroll
  for (int i = 0; i < kLaneChannels / kPer; ++i) {
    if (aligned) {
      x.words[i] = load_keep(p + i * kPer);
    } else {
      T part[kPer];
#pragma unroll
      for (int j = 0; j < kPer; ++j) part[j] = p[i * kPer + j];
      memcpy(&x.words[i], part, 16);
    }
  }
  return x;
}
template <class T>
__device__ __forceinline__ void load16(const T* p, float (&x)[kLaneChannels]) {
  const Words16<T> words = load_words16(p);
#pragma unroll
  for (int i = 0; i < kLaneChannels; ++i) x[i] = words[i];
}
template <class T>
__device__ __forceinline__ void store16(T* p, const float (&x)[kLaneChannels]) {
  constexpr int kWords = kLaneChannels * sizeof(T) / 16, kPer = 16 / sizeof(T);
  if (reinterpret_cast<uintptr_t>(p) % 16 == 0) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      T part[kPer];
#pragma unroll
      for (int j = 0; j < kPer; ++j) part[j] = from_float<T>(x[i * kPer + j]);
      uint4 word;
      memcpy(&word, part, 16);
      reinterpret_cast<uint4*>(p)[i] = word;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kLaneChannels; ++i) p[i] = from_float<T>(x[i]);
  }
}
template <class T>
__device__ __forceinline__ void store16(T* p, const float (&x)[kLaneChannels], Dtype dtype) {
  with_type<T>(dtype, [&](auto type) { store16(reinterpret_cast<decltype(type)*>(p), x); });
}

// Calls f with a null pointer of the element type: the one place a run-time dtype becomes a type.
template <class F>
void dispatch_dtype(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::kFloat32:
      return f(static_cast<float*>(nullptr));
    case Dtype::kFloat16:
      return f(static_cast<__half*>(nullptr));
    case Dtype::kBFloat16:
      return f(static_cast<__nv_bfloat16*>(nullptr));
  }
}

}  // namespace kvquant::cuda
