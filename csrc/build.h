// What the compiler of expand.cu knew, for bindings.cpp, which sees neither nvcc's macros nor torch's headers.
#pragma once

#include <cstdint>

namespace growkit {

struct BuildFacts {
  const char* archs;  // "(800,900)"
  int cuda_major, cuda_minor;
  uint64_t torch_target;  // the oldest torch whose stable ABI is used: major and minor are the two highest bytes
  bool stream_found;      // whether torch's CUDA library was there when this library was loaded
};

// Weak: absent where bindings.cpp is compiled without the kernels, as the host tests do.
__attribute__((weak)) BuildFacts build_facts();

}  // namespace growkit
