// Just enough of CUDA to run the kernels of csrc/ on the host, block after block, each thread a fiber that runs to its
// next
// __syncthreads(). Threads may run in either order, so that a missing barrier shows as a result that depends on it.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static

using std::fmaf;

struct Index {
  unsigned x;
};
struct float4 {
  float x, y, z, w;
};
struct uint2 {
  unsigned x, y;
};
struct int4 {
  int x, y, z, w;
};
using cudaStream_t = void*;

inline Index threadIdx, blockIdx;

template <typename T>
T __ldcs(const T* p) {
  return *p;
}
template <typename T>
void __stcs(T* p, T v) {
  *p = v;
}
inline float __uint_as_float(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline void __trap() { std::abort(); }

namespace host {

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool done, waiting;
};

inline std::vector<Fiber> fibers;
inline std::function<void()> body;
inline ucontext_t scheduler;
inline bool backwards = false;

inline void fiber_main() {
  body();
  fibers[threadIdx.x].done = true;
  swapcontext(&fibers[threadIdx.x].context, &scheduler);
}

// Shared memory of the running block: NaN at first, and a guard beyond what the launch asked for.
alignas(16) inline float4 shared[4096];

inline void run_block(unsigned threads, size_t bytes) {
  constexpr size_t kStack = 128 * 1024;
  std::memset(shared, 0xff, bytes);
  std::memset(reinterpret_cast<char*>(shared) + bytes, 0x55, sizeof(shared) - bytes);
  if (fibers.size() != threads) {
    fibers.clear();
    fibers.resize(threads);
    for (Fiber& fiber : fibers) fiber.stack.reset(new char[kStack]);
  }
  for (Fiber& fiber : fibers) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    fiber.done = fiber.waiting = false;
    makecontext(&fiber.context, fiber_main, 0);
  }
  for (bool live = true; live;) {
    unsigned ended = 0, waiting = 0;
    for (unsigned i = 0; i < threads; ++i) {
      const unsigned thread = backwards ? threads - 1 - i : i;
      if (!fibers[thread].done) {
        threadIdx.x = thread;
        fibers[thread].waiting = false;
        swapcontext(&scheduler, &fibers[thread].context);
      }
      ended += fibers[thread].done;
      waiting += fibers[thread].waiting;
    }
    if (waiting && ended) {
      std::printf("block %u: %u threads wait at a barrier that %u have left behind\n", blockIdx.x, waiting, ended);
      std::exit(1);
    }
    live = waiting;
  }
  for (size_t i = bytes; i < sizeof(shared); ++i) {
    if (reinterpret_cast<char*>(shared)[i] != 0x55) {
      std::printf("block %u: shared memory beyond %zu bytes was written\n", blockIdx.x, bytes);
      std::exit(1);
    }
  }
}

template <typename Kernel, typename... Arguments>
void launch(Kernel* kernel, int64_t blocks, unsigned threads, size_t bytes, const Arguments&... arguments) {
  body = [&] { kernel(arguments...); };
  for (int64_t block = 0; block < blocks; ++block) {
    blockIdx.x = block;
    run_block(threads, bytes);
  }
}

}  // namespace host

inline void __syncthreads() {
  const unsigned thread = threadIdx.x;
  host::fibers[thread].waiting = true;
  swapcontext(&host::fibers[thread].context, &host::scheduler);
  threadIdx.x = thread;
}
