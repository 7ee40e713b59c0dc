// x = hi + lo, both TF32 (8 exponent bits, 10 of the fraction), laid side by side so that one TF32 product over three
// times the length is hi*hi + hi*lo + lo*hi: float32 accuracy on tensor cores, but for lo*lo and the rounding of lo.
#include "device.h"
#include "kernels.h"

namespace growkit {
namespace {

__device__ __forceinline__ float tf32(float v) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(v));
  return __uint_as_float(bits);
}

// Parts of the left operand: lo, hi, hi; of the right one: hi, lo, hi. The small products come first in the sum.
template <int width>
__global__ void __launch_bounds__(kThreads)
    split_kernel(const float* x, float* y, int64_t count, int64_t span, int64_t m, int64_t outer, int64_t row,
                 int64_t column, bool runs, bool right) {
  const int64_t item = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (item >= count) return;
  const SplitPlace at = split_place(item, span, width);
  int64_t from = at.outer * outer + at.inner;
  if (!runs) {
    int64_t r, c;
    divide(at.inner, m, r, c);
    from = at.outer * outer + r * row + c * column;
  }
  float v[width], hi[width], lo[width];
  load<kFloat32, width>(x, from, v);
#pragma unroll
  for (int i = 0; i < width; ++i) {
    hi[i] = tf32(v[i]);
    lo[i] = tf32(v[i] - hi[i]);
  }
  store<kFloat32, width>(y, split_target(at, span, right), lo);
  store<kFloat32, width>(y, split_target(at, span, !right), hi);
  store<kFloat32, width>(y, split_target(at, span, 2), hi);
}

}  // namespace

void launch_split(const float* x, float* y, int64_t n, int64_t k, int64_t m, const int64_t strides[3], bool runs,
                  bool right, const SplitPlan& plan, cudaStream_t stream) {
  auto* kernel = plan.width == 1 ? split_kernel<1> : split_kernel<kVector>;
  kernel<<<plan.blocks, kThreads, 0, stream>>>(x, y, n * k * m / plan.width, k * m, m, strides[0], strides[1],
                                               strides[2], runs, right);
}

}  // namespace growkit
