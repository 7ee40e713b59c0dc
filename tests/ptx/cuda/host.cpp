// What stands in for CUDA's runtime and for a CUDA device where the code that nvcc compiles for the host is linked to
// it: csrc's own entry points then check and take apart CPU tensors, plan, and launch. A launch is handed to Python, the
// kernel by its name in the PTX and its arguments as they lie in memory.
#include <cuda_runtime.h>
#include <torch/csrc/stable/c/shim.h>

#include <map>
#include <string>
#include <vector>

using Launch = int (*)(const char* kernel, unsigned blocks, unsigned threads, size_t shared, void** arguments);

static Launch launch = nullptr;
static cudaError_t last = cudaSuccess;

extern "C" __attribute__((visibility("default"))) void emulate(Launch by) { launch = by; }

// --- the runtime that nvcc's host code calls ---

static std::map<const void*, std::string>& kernels() {
  static std::map<const void*, std::string> names;  // filled by constructors of other files
  return names;
}

static std::map<const void*, size_t>& shared_limits() {
  static std::map<const void*, size_t> limits;
  return limits;
}

struct Configuration {
  dim3 grid, block;
  size_t shared;
};
static std::vector<Configuration> configurations;

extern "C" {
void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* stub, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*, int*) {
  kernels()[stub] = name;
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, CUstream_st*) {
  configurations.push_back({grid, block, shared});
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void*) {
  *grid = configurations.back().grid;
  *block = configurations.back().block;
  *shared = configurations.back().shared;
  configurations.pop_back();
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* stub) {
  *kernel = static_cast<cudaKernel_t>(const_cast<void*>(stub));
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) shared_limits()[kernel] = value;
  return value <= 99 * 1024 ? cudaSuccess : cudaErrorInvalidValue;  // what every device since sm_80 has
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                               cudaStream_t) {
  const auto limit = shared_limits().find(kernel);
  if (shared > (limit == shared_limits().end() ? 48 * 1024 : limit->second)) return last = cudaErrorInvalidValue;
  const bool flat = grid.y == 1 && grid.z == 1 && block.y == 1 && block.z == 1;
  const bool done = flat && launch(kernels().at(kernel).c_str(), grid.x, block.x, shared, arguments) == 0;
  return last = done ? cudaSuccess : cudaErrorLaunchFailure;
}
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaGetLastError() {
  const cudaError_t error = last;
  last = cudaSuccess;
  return error;
}
const char* cudaGetErrorString(cudaError_t) { return "the emulator refused the launch"; }

// --- torch, where it would say that a tensor is on the CPU ---

AOTITorchError aoti_torch_get_device_type(AtenTensorHandle, int32_t* type) {
  *type = aoti_torch_device_type_cuda();
  return 0;
}
AOTITorchError aoti_torch_get_device_index(AtenTensorHandle, int32_t* index) {
  *index = 0;
  return 0;
}
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
}
