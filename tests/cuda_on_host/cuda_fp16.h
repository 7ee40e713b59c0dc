// float16 stands in as bfloat16: which of two 16-bit types it is makes no difference to the paths through the kernels.
#pragma once

#include "cuda_bf16.h"

struct __half {
  __nv_bfloat16 v;
};
inline float __half2float(__half h) { return __bfloat162float(h.v); }
inline __half __float2half_rn(float f) { return {__float2bfloat16_rn(f)}; }
