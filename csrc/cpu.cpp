#include "cpu.h"

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <stdexcept>

#define GROWKIT_INLINE inline __attribute__((always_inline))

namespace growkit {
namespace {

// --- arithmetic. Everything is inlined into functions that are compiled once per instruction set (below); nothing is
// contracted by the compiler, and `fused` says whether a*b + c is rounded once, as torch's kernels do where there is an
// instruction for it.

template <bool fused>
GROWKIT_INLINE float multiply_add(float a, float b, float c) {
  return fused ? __builtin_fmaf(a, b, c) : a * b + c;
}

template <typename To, typename From>
GROWKIT_INLINE To bits_of(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}

GROWKIT_INLINE void widen(const uint16_t* __restrict x, float* __restrict y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = bits_of<float>(static_cast<uint32_t>(x[i]) << 16);
}

// The words of random blocks, read by halves: on a little-endian machine the first one is the low half of the first word.
using Half = uint16_t __attribute__((may_alias));
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__);

// Rounds to bfloat16: `random`ly, by adding the bits below the 16 that are kept; else to nearest, ties to even.
template <bool random>
GROWKIT_INLINE void narrow(const float* __restrict x, [[maybe_unused]] const Half* __restrict bits,
                           uint16_t* __restrict y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t b = bits_of<uint32_t>(x[i]), magnitude = b & 0x7FFFFFFF, nearest = 0x7FFF + (b >> 16 & 1);
    const uint32_t up = random && magnitude < 0x7F800000 ? bits[i] : nearest;
    y[i] = magnitude > 0x7F800000 ? 0x7FC0 : (b + up) >> 16;  // one NaN for all
  }
}

// Philox4x32-10 of `count` consecutive blocks: 4 words each.
GROWKIT_INLINE void philox(uint64_t block, int64_t count, uint32_t parameter, const RandomKey& key,
                           uint32_t* __restrict words) {
  const uint32_t key0 = static_cast<uint32_t>(key.seed), key1 = static_cast<uint32_t>(key.seed >> 32) ^ key.stream;
  for (int64_t i = 0; i < count; ++i) {
    uint32_t c0 = static_cast<uint32_t>(block + i), c1 = static_cast<uint32_t>((block + i) >> 32), c2 = parameter,
             c3 = key.time, k0 = key0, k1 = key1;
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
      const uint64_t x = static_cast<uint64_t>(c0) * 0xD2511F53u, y = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
      c0 = static_cast<uint32_t>(y >> 32) ^ c1 ^ k0;
      c1 = static_cast<uint32_t>(y);
      c2 = static_cast<uint32_t>(x >> 32) ^ c3 ^ k1;
      c3 = static_cast<uint32_t>(x);
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    words[4 * i] = c0;
    words[4 * i + 1] = c1;
    words[4 * i + 2] = c2;
    words[4 * i + 3] = c3;
  }
}

// Rounds a slice of elements to bfloat16, of which `first` is the first one's index in its parameter.
GROWKIT_INLINE void round(const float* x, uint16_t* y, int64_t n, uint64_t first, int64_t parameter,
                          const RandomKey& key) {
  if (!key.random) return narrow<false>(x, nullptr, y, n);
  alignas(64) uint32_t words[4 * (kSlice / 8 + 1)];
  const uint64_t block = first / 8, stop = (first + n + 7) / 8;
  philox(block, stop - block, static_cast<uint32_t>(parameter), key, words);
  narrow<true>(x, reinterpret_cast<const Half*>(words) + first % 8, y, n);
}

// A slice of an array as float32: the array itself, or a copy that `buffer` holds.
GROWKIT_INLINE const float* read(const void* array, Type type, int64_t at, int64_t n, float* buffer) {
  if (type == kFloat32) return static_cast<const float*>(array) + at;
  widen(static_cast<const uint16_t*>(array) + at, buffer, n);
  return buffer;
}

GROWKIT_INLINE float* read(void* array, Type type, int64_t at, int64_t n, float* buffer) {
  return const_cast<float*>(read(static_cast<const void*>(array), type, at, n, buffer));
}

// One element; returns whether |mbar| < d.
template <bool fused, bool max, bool nesterov>
GROWKIT_INLINE int32_t update_one(float& w, float g, float& m, float h, const StepOptions& o) {
  m = multiply_add<fused>(g * o.scale, o.gain, m * o.beta1);
  const float mbar = nesterov ? multiply_add<fused>(g * o.scale, o.gain, m * o.beta1) : m;
  const float x = h * o.rho_bs;
  const float u = mbar / (max ? (x < o.eps ? o.eps : x) : x + o.eps);
  const float least = u < -1 ? -1 : u, clipped = least > 1 ? 1 : least;  // a NaN stays one
  w = multiply_add<fused>(clipped, -o.lr, w * o.decay);
  return __builtin_fabsf(u) < 1;
}

// Memory bounds it, and a core's own prefetching of four streams falls short: each cache line is asked for kAhead early.
template <bool fused, bool max, bool nesterov>
GROWKIT_INLINE int64_t update(float* __restrict w, const float* __restrict g, float* __restrict m,
                              const float* __restrict h, int64_t n, const StepOptions& options) {
  const StepOptions o = options;  // a copy, which no store can change
  int32_t counts[kLine] = {};
  int64_t i = 0;
  for (; i + kLine <= n; i += kLine) {
    for (const float* stream : {static_cast<const float*>(w), g, static_cast<const float*>(m), h}) {
      __builtin_prefetch(stream + i + kAhead);
    }
    for (int64_t j = 0; j < kLine; ++j) {
      counts[j] += update_one<fused, max, nesterov>(w[i + j], g[i + j], m[i + j], h[i + j], o);
    }
  }
  int64_t unclipped = 0;
  for (; i < n; ++i) unclipped += update_one<fused, max, nesterov>(w[i], g[i], m[i], h[i], o);
  for (int32_t count : counts) unclipped += count;
  return unclipped;
}

template <bool fused, bool max>
GROWKIT_INLINE int64_t update_by(float* w, const float* g, float* m, const float* h, int64_t n, const StepOptions& o) {
  return o.nesterov ? update<fused, max, true>(w, g, m, h, n, o) : update<fused, max, false>(w, g, m, h, n, o);
}

template <bool fused>
GROWKIT_INLINE int64_t step_block(const StepTensor& t, const StepOptions& o, int64_t at, int64_t stop) {
  alignas(64) float p_[kSlice], g_[kSlice], m_[kSlice], h_[kSlice];
  int64_t unclipped = 0;
  for (; at < stop; at += kSlice) {
    const int64_t n = std::min(kSlice, stop - at);
    float* w = t.w ? t.w + at : read(t.p, o.p, at, n, p_);
    float* m = read(t.m, o.m, at, n, m_);
    const float *g = read(t.g, o.g, at, n, g_), *h = read(t.h, o.h, at, n, h_);
    unclipped += o.max ? update_by<fused, true>(w, g, m, h, n, o) : update_by<fused, false>(w, g, m, h, n, o);
    if (o.m == kBFloat16) narrow<false>(m, nullptr, static_cast<uint16_t*>(t.m) + at, n);
    if (o.p == kBFloat16) round(w, static_cast<uint16_t*>(t.p) + at, n, t.first + at, t.parameter, o.rounding);
  }
  return unclipped;
}

template <bool fused>
GROWKIT_INLINE void refresh_block(const RefreshTensor& t, const RefreshOptions& o, int64_t at, int64_t stop) {
  alignas(64) float h_[kSlice], g_[kSlice];
  for (; at < stop; at += kSlice) {
    const int64_t n = std::min(kSlice, stop - at);
    float* __restrict h = read(t.h, o.h, at, n, h_);
    const float* __restrict g = read(t.g, o.g, at, n, g_);
    const float beta2 = o.beta2, gain = o.gain;
    for (int64_t i = 0; i < n; ++i) h[i] = multiply_add<fused>(gain * g[i], g[i], h[i] * beta2);
    if (o.h == kBFloat16) round(h, static_cast<uint16_t*>(t.h) + at, n, t.first + at, t.parameter, o.rounding);
  }
}

// --- instruction sets

struct Instructions {
  const char* name;
  int64_t (*step)(const StepTensor&, const StepOptions&, int64_t, int64_t);
  void (*refresh)(const RefreshTensor&, const RefreshOptions&, int64_t, int64_t);
};

#define GROWKIT_COMPILED_FOR(name, attributes, fused)                                                             \
  attributes int64_t step_##name(const StepTensor& t, const StepOptions& o, int64_t at, int64_t stop) {           \
    return step_block<fused>(t, o, at, stop);                                                                     \
  }                                                                                                               \
  attributes void refresh_##name(const RefreshTensor& t, const RefreshOptions& o, int64_t at, int64_t stop) {     \
    refresh_block<fused>(t, o, at, stop);                                                                         \
  }

#ifdef __FP_FAST_FMAF
constexpr bool kBaselineIsFused = true;
#else
constexpr bool kBaselineIsFused = false;
#endif
GROWKIT_COMPILED_FOR(baseline, , kBaselineIsFused)
#ifdef __x86_64__
GROWKIT_COMPILED_FOR(avx2, __attribute__((target("avx2,fma"))), true)
GROWKIT_COMPILED_FOR(avx512, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512"))),
                     true)
#endif

constexpr Instructions kInstructions[] = {
    {"DEFAULT", step_baseline, refresh_baseline},
#ifdef __x86_64__
    {"AVX2", step_avx2, refresh_avx2},
    {"AVX512", step_avx512, refresh_avx512},
#endif
};
const Instructions* used = kInstructions;

// --- threads

// torch_parallel_for of torch's stable C interface (2.10 and newer). It is looked up in the libtorch_cpu that is loaded,
// so that this library can be built, and loaded, without torch; then one thread does all.
using Body = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain, Body body, void* context);

ParallelFor find_parallel_for() {
  void* torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
  return torch ? reinterpret_cast<ParallelFor>(dlsym(torch, "torch_parallel_for")) : nullptr;
}

// Calls f(tensor, first element, one past the last) for blocks that together are all of the tensors.
template <typename Tensor, typename F>
void for_blocks(const std::vector<Tensor>& tensors, const F& f) {
  std::vector<int64_t> ends;  // the number of blocks up to and with each tensor
  int64_t total = 0;
  for (const Tensor& t : tensors) ends.push_back(total += ceil_div(t.count, kBlock));
  const auto range = [&](int64_t begin, int64_t end) {
    size_t i = std::upper_bound(ends.begin(), ends.end(), begin) - ends.begin();
    for (int64_t block = begin; block < end; ++block) {
      while (ends[i] <= block) ++i;
      const Tensor& t = tensors[i];
      const int64_t at = (block - (ends[i] - ceil_div(t.count, kBlock))) * kBlock;
      f(t, at, std::min(at + kBlock, t.count));
    }
  };
  const ParallelFor parallel_for = find_parallel_for();
  const Body body = [](int64_t begin, int64_t end, void* context) {
    (*static_cast<decltype(range)*>(context))(begin, end);
  };
  if (!parallel_for) return range(0, total);
  if (parallel_for(0, total, 2, body, const_cast<void*>(static_cast<const void*>(&range)))) {
    throw std::runtime_error("growkit: torch_parallel_for failed");
  }
}

}  // namespace

std::string use_instructions(const std::string& name) {
  used = kInstructions;
  for (const Instructions& each : kInstructions) {
    if (name == each.name) used = &each;
  }
  return used->name;
}

bool on_torch_threads() { return find_parallel_for() != nullptr; }

int64_t sophia_step(const std::vector<StepTensor>& tensors, const StepOptions& options) {
  std::atomic<int64_t> unclipped{0};
  for_blocks(tensors, [&](const StepTensor& t, int64_t at, int64_t stop) {
    unclipped.fetch_add(used->step(t, options, at, stop), std::memory_order_relaxed);
  });
  return unclipped;
}

void gnb_ema(const std::vector<RefreshTensor>& tensors, const RefreshOptions& options) {
  for_blocks(tensors,
             [&](const RefreshTensor& t, int64_t at, int64_t stop) { used->refresh(t, options, at, stop); });
}

}  // namespace growkit
