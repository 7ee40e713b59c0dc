// Reading and writing float32, bfloat16 and float16 as float, four neighbours or one; streaming, as nothing is read
// twice.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "launch.h"

namespace growkit {

template <int32_t>
struct Storage;
template <>
struct Storage<kFloat32> {
  using One = float;
  using Four = float4;
  static __device__ __forceinline__ float wide(float v) { return v; }
  static __device__ __forceinline__ float narrow(float v) { return v; }
};
template <>
struct Storage<kBFloat16> {
  using One = __nv_bfloat16;
  using Four = uint2;
  static __device__ __forceinline__ float wide(__nv_bfloat16 v) { return __bfloat162float(v); }
  static __device__ __forceinline__ __nv_bfloat16 narrow(float v) { return __float2bfloat16_rn(v); }
};
template <>
struct Storage<kFloat16> {
  using One = __half;
  using Four = uint2;
  static __device__ __forceinline__ float wide(__half v) { return __half2float(v); }
  static __device__ __forceinline__ __half narrow(float v) { return __float2half_rn(v); }
};

template <int32_t type>
__device__ __forceinline__ void widen(typename Storage<type>::Four four, float (&v)[4]) {
  union {
    typename Storage<type>::Four four;
    typename Storage<type>::One one[4];
  } pack;
  pack.four = four;
#pragma unroll
  for (int i = 0; i < 4; ++i) v[i] = Storage<type>::wide(pack.one[i]);
}

template <int32_t type, int width>
__device__ __forceinline__ void load(const void* base, int64_t offset, float (&v)[width]) {
  using One = typename Storage<type>::One;
  const One* p = static_cast<const One*>(base) + offset;
  if constexpr (width == 1) {
    v[0] = Storage<type>::wide(__ldcs(p));
  } else {
    widen<type>(__ldcs(reinterpret_cast<const typename Storage<type>::Four*>(p)), v);
  }
}

template <int32_t type, int width>
__device__ __forceinline__ void store(void* base, int64_t offset, const float (&v)[width]) {
  using One = typename Storage<type>::One;
  One* p = static_cast<One*>(base) + offset;
  if constexpr (width == 1) {
    __stcs(p, Storage<type>::narrow(v[0]));
  } else {
    union Pack {
      typename Storage<type>::Four four;
      One one[4];
      __device__ Pack() {}
    } pack;
#pragma unroll
    for (int i = 0; i < 4; ++i) pack.one[i] = Storage<type>::narrow(v[i]);
    __stcs(reinterpret_cast<typename Storage<type>::Four*>(p), pack.four);
  }
}

// The same for a type known at run time. All threads of a block agree, so the branch costs little.
template <int width>
__device__ __forceinline__ void store_as(int32_t type, void* base, int64_t offset, const float (&v)[width]) {
  if (type == kFloat32) {
    store<kFloat32, width>(base, offset, v);
  } else if (type == kBFloat16) {
    store<kBFloat16, width>(base, offset, v);
  } else {
    store<kFloat16, width>(base, offset, v);
  }
}

}  // namespace growkit
