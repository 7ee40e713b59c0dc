// Sophia's update and the Gauss-Newton-Bartlett refresh of lists of CPU tensors, on plain pointers. The equations stand
// in growkit/reference; results have its bits, with the instruction set that torch uses, for any number of threads.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "launch.h"

namespace growkit {

constexpr int64_t kSlice = 1024;   // elements in the first-level cache at a time
constexpr int64_t kBlock = 16384;  // elements that a thread takes at a time
constexpr int64_t kLine = 16;      // elements of a cache line
constexpr int64_t kAhead = 256;    // elements

struct RandomKey {  // of 16 bits for each element, by Philox4x32-10
  bool random;      // false: rounding to nearest needs none
  uint64_t seed;
  uint32_t stream, time;
};

// Arrays of float32 or bfloat16 in memory order. w: float32 values that p is rounded from, null where there are none.
struct StepTensor {
  void* p;
  const void* g;
  void* m;
  const void* h;
  float* w;
  int64_t count;
  int64_t parameter, first;  // of the random bits: index of the parameter, and of the first element within it
};

struct StepOptions {
  Type p, g, m, h;
  float lr, decay, beta1, gain, rho_bs, eps, scale;
  bool max;       // d = max(rho_bs*h, eps), else rho_bs*h + eps
  bool nesterov;  // mbar = beta1*m + gain*g, else m
  RandomKey rounding;
};

struct RefreshTensor {
  void* h;
  const void* g;
  int64_t count, parameter, first;
};

struct RefreshOptions {
  Type h, g;
  float beta2, gain;
  RandomKey rounding;
};

// Names as torch.backends.cpu.get_cpu_capability() has them; unknown ones mean the compiler's baseline. Returns the name
// of what will be used.
std::string use_instructions(const std::string& name);

// Whether work is shared among torch's threads; false without torch.
bool on_torch_threads();

// Returns the number of elements with |mbar| < d.
int64_t sophia_step(const std::vector<StepTensor>& tensors, const StepOptions& options);
void gnb_ema(const std::vector<RefreshTensor>& tensors, const RefreshOptions& options);

}  // namespace growkit
