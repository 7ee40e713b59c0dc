// Depth mix + assemble, and its backward. Sums are in float32 and in a fixed order.
#include "device.h"
#include "kernels.h"

namespace growkit {
namespace {

// x[l] of every layer, zero beyond layers_in: all loads are issued before the first is used.
template <int32_t type, int layers, int width>
__device__ __forceinline__ void load_layers(const MixJob& job, int64_t offset, float (&x)[layers][width]) {
#pragma unroll
  for (int l = 0; l < layers; ++l) {
    if (l < job.layers_in) {
      load<type, width>(job.x, offset + l * job.x_layer, x[l]);
    } else {
#pragma unroll
      for (int i = 0; i < width; ++i) x[l][i] = 0.0f;
    }
  }
}

template <int layers, int width>
__device__ __forceinline__ void load_layers_as(const MixJob& job, int64_t offset, float (&x)[layers][width]) {
  if (job.x_type == kFloat32) {
    load_layers<kFloat32>(job, offset, x);
  } else if (job.x_type == kBFloat16) {
    load_layers<kBFloat16>(job, offset, x);
  } else {
    load_layers<kFloat16>(job, offset, x);
  }
}

template <int width>
__device__ __forceinline__ void load_as(const MixJob& job, int64_t offset, float (&v)[width]) {
  if (job.x_type == kFloat32) {
    load<kFloat32, width>(job.x, offset, v);
  } else if (job.x_type == kBFloat16) {
    load<kBFloat16, width>(job.x, offset, v);
  } else {
    load<kFloat16, width>(job.x, offset, v);
  }
}

__device__ __forceinline__ float scale_at(const MixJob& job, int64_t row, int64_t column) {
  return (job.row_scale ? job.row_scale[row] : 1.0f) * (job.column_scale ? job.column_scale[column] : 1.0f);
}

// One row of w against the layers in registers; w is padded with zeros to `layers`, a multiple of four.
template <int layers, int width>
__device__ __forceinline__ void dot(const float* w, const float (&x)[layers][width], float (&y)[width]) {
#pragma unroll
  for (int i = 0; i < width; ++i) y[i] = 0.0f;
#pragma unroll
  for (int l = 0; l < layers; l += 4) {
    const float4 four = *reinterpret_cast<const float4*>(w + l);
#pragma unroll
    for (int i = 0; i < width; ++i) {
      y[i] = fmaf(four.x, x[l][i], y[i]);
      y[i] = fmaf(four.y, x[l + 1][i], y[i]);
      y[i] = fmaf(four.z, x[l + 2][i], y[i]);
      y[i] = fmaf(four.w, x[l + 3][i], y[i]);
    }
  }
}

template <int layers, int width>
__device__ __forceinline__ void mix_rows(const MixJob& job, void* const* targets, int64_t block, const float* w) {
  const Place at = mix_place(job, block, threadIdx.x);
  if (!at.inside) return;
  const int64_t from = at.row * job.x_row + at.column * job.x_column;
  const int64_t to = at.row * job.y_row + at.column * job.y_column;
  float scale[width];
#pragma unroll
  for (int i = 0; i < width; ++i) scale[i] = scale_at(job, at.row, at.column + i);
  float x[layers][width];
  load_layers_as(job, from, x);
  for (int l2 = 0; l2 < job.layers_out; ++l2) {
    float y[width];
    dot(w + l2 * layers, x, y);
#pragma unroll
    for (int i = 0; i < width; ++i) y[i] *= scale[i];
    store_as(job.y_type, targets[l2], to, y);
  }
}

template <int layers>
__device__ __forceinline__ void mix_tiles(const MixJob& job, void* const* targets, int64_t block, const float* w,
                                          float* tiles) {
  float x[layers][kTileParts], one[layers][1], scale[kTileParts];
#pragma unroll
  for (int part = 0; part < kTileParts; ++part) {
    const Place at = mix_tile_place(job, block, threadIdx.x, part, false);
    scale[part] = at.inside ? scale_at(job, at.row, at.column) : 0.0f;
    if (at.inside) load_layers_as(job, at.row * job.x_row + at.column * job.x_column, one);
#pragma unroll
    for (int l = 0; l < layers; ++l) x[l][part] = at.inside ? one[l][0] : 0.0f;
  }
  const int fast = threadIdx.x % kTile, slow = threadIdx.x / kTile;
  for (int l2 = 0; l2 < job.layers_out; ++l2) {
    float* tile = tiles + l2 % 2 * kTile * (kTile + 1);  // the other one may still be read
    float y[kTileParts];
    dot(w + l2 * layers, x, y);
#pragma unroll
    for (int part = 0; part < kTileParts; ++part) {
      tile[(slow + part * kTileRows) * (kTile + 1) + fast] = y[part] * scale[part];
    }
    __syncthreads();
#pragma unroll
    for (int part = 0; part < kTileParts; ++part) {
      const Place at = mix_tile_place(job, block, threadIdx.x, part, true);
      const float v[1] = {tile[fast * (kTile + 1) + slow + part * kTileRows]};
      if (at.inside) store_as(job.y_type, targets[l2], at.row * job.y_row + at.column * job.y_column, v);
    }
  }
}

__device__ void mix_deep(const MixJob& job, void* const* targets, int64_t block) {
  const Place at = mix_place(job, block, threadIdx.x);
  if (!at.inside) return;
  const int64_t from = at.row * job.x_row + at.column * job.x_column;
  const int64_t to = at.row * job.y_row + at.column * job.y_column;
  const float scale = scale_at(job, at.row, at.column);
  for (int first = 0; first < job.layers_out; first += kDeepTargets) {
    float y[kDeepTargets] = {};
    for (int l = 0; l < job.layers_in; ++l) {
      float x[1];
      load_as(job, from + l * job.x_layer, x);
#pragma unroll
      for (int i = 0; i < kDeepTargets; ++i) {
        const int l2 = first + i < job.layers_out ? first + i : first;
        y[i] = fmaf(job.w[l2 * job.w_row + l], x[0], y[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < kDeepTargets; ++i) {
      const float v[1] = {y[i] * scale};
      if (first + i < job.layers_out) store_as(job.y_type, targets[first + i], to, v);
    }
  }
}

// Layers that stay as they are: a copy with cast, scale and any strides.
template <int width>
__device__ __forceinline__ void assemble_rows(const MixJob& job, void* const* targets, int64_t block) {
  const Place at = mix_place(job, block, threadIdx.x);
  if (!at.inside) return;
  const int64_t from = at.row * job.x_row + at.column * job.x_column;
  const int64_t to = at.row * job.y_row + at.column * job.y_column;
#pragma unroll 4
  for (int l = 0; l < job.layers_out; ++l) {
    float v[width];
    load_as(job, from + l * job.x_layer, v);
#pragma unroll
    for (int i = 0; i < width; ++i) v[i] *= scale_at(job, at.row, at.column + i);
    store_as(job.y_type, targets[l], to, v);
  }
}

__device__ __forceinline__ void assemble_tiles(const MixJob& job, void* const* targets, int64_t block, float* tiles) {
  const int fast = threadIdx.x % kTile, slow = threadIdx.x / kTile;
  for (int l = 0; l < job.layers_out; ++l) {
    float* tile = tiles + l % 2 * kTile * (kTile + 1);
#pragma unroll
    for (int part = 0; part < kTileParts; ++part) {
      const Place at = mix_tile_place(job, block, threadIdx.x, part, false);
      float v[1] = {0.0f};
      if (at.inside) {
        load_as(job, at.row * job.x_row + at.column * job.x_column + l * job.x_layer, v);
        v[0] *= scale_at(job, at.row, at.column);
      }
      tile[(slow + part * kTileRows) * (kTile + 1) + fast] = v[0];
    }
    __syncthreads();
#pragma unroll
    for (int part = 0; part < kTileParts; ++part) {
      const Place at = mix_tile_place(job, block, threadIdx.x, part, true);
      const float v[1] = {tile[fast * (kTile + 1) + slow + part * kTileRows]};
      if (at.inside) store_as(job.y_type, targets[l], at.row * job.y_row + at.column * job.y_column, v);
    }
  }
}

template <int layers>
__global__ void __launch_bounds__(kThreads, 1) mix_kernel(const __grid_constant__ MixLaunch launch) {
  extern __shared__ float4 shared[];  // float4: w is read four at a time
  const MixJob& job = launch.jobs[mix_job(launch, blockIdx.x)];
  void* const* targets = launch.targets + job.first_target;
  const int64_t block = blockIdx.x - job.first_block;
  float* tiles = reinterpret_cast<float*>(shared);
  float* w = tiles + 2 * kTile * (kTile + 1);
  if (is_deep(job)) {
    mix_deep(job, targets, block);
  } else if (!job.w) {
    if (job.path == kVectorPath) {
      assemble_rows<kVector>(job, targets, block);
    } else if (job.path == kTransposedPath) {
      assemble_tiles(job, targets, block, tiles);
    } else {
      assemble_rows<1>(job, targets, block);
    }
  } else {
    for (int i = threadIdx.x; i < job.layers_out * layers; i += kThreads) {
      const int l2 = i / layers, l1 = i % layers;
      w[i] = l1 < job.layers_in ? job.w[l2 * job.w_row + l1] : 0.0f;
    }
    __syncthreads();
    if (job.path == kVectorPath) {
      mix_rows<layers, kVector>(job, targets, block, w);
    } else if (job.path == kTransposedPath) {
      mix_tiles<layers>(job, targets, block, w, tiles);
    } else {
      mix_rows<layers, 1>(job, targets, block, w);
    }
  }
}

// One tile of a stack into shared memory: this thread's column of every groups-th layer. Padding is zero.
template <int32_t type>
__device__ __forceinline__ void load_tile(const Stack& stack, int64_t offset, bool inside, int layers, int padded,
                                          int group, int groups, int pitch, float* tile) {
#pragma unroll 4
  for (int l = group; l < padded; l += groups) {
    float v[1] = {0.0f};
    if (inside && l < layers) load<type, 1>(stack.data, offset + l * stack.layer, v);
    tile[l * pitch] = v[0];
  }
}

struct MixBackward {
  int layers_in, layers_out;
  int64_t columns, elements;
  Stack G, U, mixed;
  const float* w;
  int64_t w_row;
  float* partials;
};

// Each block sums dw over its tiles in registers and writes it to its own slot; a second kernel adds the slots.
template <int32_t type, int half>  // half: of the small layers, rounded up, as two threads share a column
__global__ void __launch_bounds__(kThreads, 2) mix_backward_kernel(const MixBackward task, const MixBackwardPlan plan) {
  const auto [layers_in, layers_out, columns, elements, G, U, mixed, w, w_row, partials] = task;
  extern __shared__ float4 shared[];
  const int width = plan.columns, pitch = plan.pitch, in = padded_layers(layers_in), out = padded_layers(layers_out);
  float* g = reinterpret_cast<float*>(shared);
  float* u = g + out * pitch;
  float* w_shared = u + in * pitch;  // [layers_out][in], zero-padded
  for (int i = threadIdx.x; mixed.data && i < layers_out * in; i += kThreads) {
    const int l2 = i / in, l1 = i % in;
    w_shared[i] = l1 < layers_in ? w[l2 * w_row + l1] : 0.0f;
  }
  const int lanes = plan.lanes, piece = threadIdx.x / lanes, lane = threadIdx.x % lanes;
  const int per_row = in / kMicro;
  const bool sums = partials && piece < plan.micro_tiles;
  const float* g_piece = g + piece / per_row * kMicro * pitch;
  const float* u_piece = u + piece % per_row * kMicro * pitch;
  const int n = threadIdx.x % width, group = threadIdx.x / width, groups = kThreads / width;
  float dw[kMicro][kMicro] = {};

  for (int64_t tile = blockIdx.x; tile < plan.tiles; tile += plan.blocks) {
    const int64_t element = tile * width + n;
    const bool inside = element < elements;
    int64_t row, column;
    divide(element, columns, row, column);
    __syncthreads();  // the tile before has been used up
    load_tile<type>(G, row * G.row + column, inside, layers_out, out, group, groups, pitch, g + n);
    if (partials) load_tile<type>(U, row * U.row + column, inside, layers_in, in, group, groups, pitch, u + n);
    __syncthreads();
    if (sums) {
      for (int k = lane; k < width; k += lanes) {
        float a[kMicro], b[kMicro];
#pragma unroll
        for (int i = 0; i < kMicro; ++i) {
          a[i] = g_piece[i * pitch + k];
          b[i] = u_piece[i * pitch + k];
        }
#pragma unroll
        for (int i = 0; i < kMicro; ++i) {
#pragma unroll
          for (int j = 0; j < kMicro; ++j) dw[i][j] = fmaf(a[i], b[j], dw[i][j]);
        }
      }
    }
    if (mixed.data) {
      for (int l1 = group * half; l1 < in; l1 += groups * half) {
        float m[half] = {};
        for (int l2 = 0; l2 < layers_out; ++l2) {
          const float v = g[l2 * pitch + n];
#pragma unroll
          for (int i = 0; i < half; i += kMicro) {
            if (l1 + i < in) {
              const float4 four = *reinterpret_cast<const float4*>(w_shared + l2 * in + l1 + i);
              m[i] = fmaf(four.x, v, m[i]);
              m[i + 1] = fmaf(four.y, v, m[i + 1]);
              m[i + 2] = fmaf(four.z, v, m[i + 2]);
              m[i + 3] = fmaf(four.w, v, m[i + 3]);
            }
          }
        }
#pragma unroll
        for (int i = 0; i < half; ++i) {
          const float v[1] = {m[i]};
          if (inside && l1 + i < layers_in) {
            store<type, 1>(const_cast<void*>(mixed.data), (l1 + i) * mixed.layer + row * mixed.row + column, v);
          }
        }
      }
    }
  }

  if (!partials) return;
  __syncthreads();
  float* parts = g;  // [pieces][16][lanes]
  if (sums) {
#pragma unroll
    for (int i = 0; i < kMicro * kMicro; ++i) {
      parts[(piece * kMicro * kMicro + i) * lanes + lane] = dw[i / kMicro][i % kMicro];
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < layers_in * layers_out; i += kThreads) {
    const int l2 = i / layers_in, l1 = i % layers_in;
    const int at = (l2 / kMicro * per_row + l1 / kMicro) * kMicro * kMicro + l2 % kMicro * kMicro + l1 % kMicro;
    float sum = 0.0f;
    for (int k = 0; k < lanes; ++k) sum += parts[at * lanes + k];
    partials[static_cast<int64_t>(blockIdx.x) * layers_in * layers_out + i] = sum;
  }
}

// dw[i] = sum over blocks of partials[block][i]: a warp's lanes take neighbouring i, its warps every eighth block.
__global__ void __launch_bounds__(kThreads)
    sum_partials_kernel(const float* partials, int64_t blocks, int count, float* dw) {
  __shared__ float sums[kThreads / 32][32];
  const int i = blockIdx.x * 32 + threadIdx.x % 32, warp = threadIdx.x / 32;
  float sum = 0.0f;
  for (int64_t block = warp; i < count && block < blocks; block += kThreads / 32) sum += partials[block * count + i];
  sums[warp][threadIdx.x % 32] = sum;
  __syncthreads();
  if (warp != 0 || i >= count) return;
  sum = 0.0f;
  for (int k = 0; k < kThreads / 32; ++k) sum += sums[k][threadIdx.x];
  dw[i] = sum;
}

}  // namespace

void launch_mix(const MixLaunch& launch, cudaStream_t stream) {
  const int instance = mix_instance(launch.layers_in);
  auto* kernel = instance == 8    ? mix_kernel<8>
                 : instance == 12 ? mix_kernel<12>
                 : instance == 16 ? mix_kernel<16>
                 : instance == 24 ? mix_kernel<24>
                                  : mix_kernel<32>;
  kernel<<<launch.blocks, kThreads, mix_shared_bytes(instance, launch.layers_out), stream>>>(launch);
}

void launch_mix_backward(int64_t layers_in, int64_t layers_out, int64_t rows, int64_t columns, Type type, Stack G,
                         Stack U, Stack mixed, const float* w, int64_t w_row, float* dw, float* partials,
                         cudaStream_t stream) {
  const int in = layers_in, out = layers_out;
  const int64_t elements = rows * columns, half = ceil_div(layers_in, 2);
  const MixBackwardPlan plan = mix_backward_plan(layers_in, layers_out, elements);
  const MixBackward task{in, out, columns, elements, G, U, mixed, w, w_row, partials};
  const auto start = [&](auto* kernel) { kernel<<<plan.blocks, kThreads, plan.shared_bytes, stream>>>(task, plan); };
  const auto start_as = [&](auto* of_8, auto* of_16, auto* of_32) {
    start(half <= 8 ? of_8 : half <= 16 ? of_16 : of_32);
  };
  if (type == kFloat32) {
    start_as(mix_backward_kernel<kFloat32, 8>, mix_backward_kernel<kFloat32, 16>, mix_backward_kernel<kFloat32, 32>);
  } else if (type == kBFloat16) {
    start_as(mix_backward_kernel<kBFloat16, 8>, mix_backward_kernel<kBFloat16, 16>, mix_backward_kernel<kBFloat16, 32>);
  } else {
    start_as(mix_backward_kernel<kFloat16, 8>, mix_backward_kernel<kFloat16, 16>, mix_backward_kernel<kFloat16, 32>);
  }
  if (dw) sum_partials_kernel<<<ceil_div(in * out, 32), kThreads, 0, stream>>>(partials, plan.blocks, in * out, dw);
}

}  // namespace growkit
