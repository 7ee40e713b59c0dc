// Depth mix + assemble, and its backward. Sums are in float32 and in a fixed order.
#include <cuda_pipeline.h>

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

// Copies a warp's lines of a tile, every `warps`th layer of a stack, to shared memory: neighbours of aligned stacks by
// copies that go on after this returns, others one by one, with zeros beyond the last element.
template <int32_t type>
__device__ __forceinline__ void fetch(const void* stack, int layers, int64_t elements, int64_t column, bool aligned,
                                      int warp, int warps, typename Storage<type>::One* tile) {
  using One = typename Storage<type>::One;
  const int64_t next = warps * elements;
  const One* from = static_cast<const One*>(stack) + warp * elements + column;
  One* to = tile + warp * kBackwardColumns + threadIdx.x % kWarp * kVector;
  if (aligned && column < elements) {
#pragma unroll 4
    for (int l = warp; l < layers; l += warps) {
      __pipeline_memcpy_async(to, from, kVector * sizeof(One));
      from += next;
      to += warps * kBackwardColumns;
    }
  } else {
#pragma unroll 1
    for (int l = warp; l < layers; l += warps) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) to[i] = column + i < elements ? from[i] : Storage<type>::narrow(0.0f);
      from += next;
      to += warps * kBackwardColumns;
    }
  }
}

// The four columns of this thread in a layer of a tile.
template <int32_t type>
__device__ __forceinline__ void read(const typename Storage<type>::One* layer, float (&v)[kVector]) {
  widen<type>(reinterpret_cast<const typename Storage<type>::Four*>(layer)[threadIdx.x % kWarp], v);
}

// What an even number of layers of G add to dw and, in their order, to m. w: of each of them, for kMicro layers of U.
template <int32_t type, bool sums, bool mixes>
__device__ __forceinline__ void use_layers(const typename Storage<type>::One* G, int layers, const float4* w,
                                           const float (&u)[kMicro][kVector], float (&m)[kMicro][kVector],
                                           float (&dw)[kChunk * kMicro]) {
#pragma unroll
  for (int l = 0; l < kChunk; ++l) {
    if (l % 2 == 0 && l >= layers) break;  // in twos, so that not more of them are loaded ahead than registers hold
    float g[kVector];
    read<type>(G + l * kBackwardColumns, g);
    if constexpr (sums) {
#pragma unroll
      for (int j = 0; j < kMicro; ++j) {
#pragma unroll
        for (int c = 0; c < kVector; ++c) dw[l * kMicro + j] = fmaf(g[c], u[j][c], dw[l * kMicro + j]);
      }
    }
    if constexpr (mixes) {
      const float4 four = w[l];
#pragma unroll
      for (int c = 0; c < kVector; ++c) {
        m[0][c] = fmaf(four.x, g[c], m[0][c]);
        m[1][c] = fmaf(four.y, g[c], m[1][c]);
        m[2][c] = fmaf(four.z, g[c], m[2][c]);
        m[3][c] = fmaf(four.w, g[c], m[3][c]);
      }
    }
  }
}

// Adds `count` sums up over a warp; each lane ends with count / 32 of them, in the order of the lanes: lanes `bit`
// apart add theirs, each for one half, and so on with that half.
template <int bit, int count>
__device__ __forceinline__ void add_lanes(float (&sums)[count], int lane) {
  constexpr int half = count / kWarp * bit;
  const bool upper = lane & bit;
#pragma unroll
  for (int i = 0; i < half; ++i) {
    const float low = sums[i], high = sums[half + i];
    sums[i] = (upper ? high : low) + __shfl_xor_sync(0xffffffff, upper ? low : high, bit);
  }
  if constexpr (bit > 1) add_lanes<bit / 2>(sums, lane);
}

// Each thread sums dw for its four columns of the block's tiles; its warp adds those up and writes them to the block's
// slot, and a second kernel adds the slots.
template <int32_t type>
__global__ void __launch_bounds__(kBackwardWarps * kWarp)
    mix_backward_kernel(const MixBackward task, const MixBackwardPlan plan, const bool aligned) {
  using One = typename Storage<type>::One;
  extern __shared__ float4 shared[];
  const int layers_in = task.layers_in, layers_out = task.layers_out, out = padded_layers(layers_out);
  const int groups = plan.groups, chunk = plan.chunk, in = kMicro * groups, threads = plan.threads;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int first_in = blockIdx.x % static_cast<int>(plan.sets) * in, set_layers = min(in, layers_in - first_in);
  const int64_t elements = task.elements;
  const int block = blockIdx.x / static_cast<int>(plan.sets), blocks = plan.blocks;
  const int count = plan.tiles;  // fits: so many tiles are terabytes
  const int group = warp % groups * kMicro, own = warp / groups * chunk;  // this warp's first layers
  float* w = reinterpret_cast<float*>(shared);                           // [groups][out][kMicro]
  One* tiles = reinterpret_cast<One*>(w + out * in);                     // [2][out + in][kBackwardColumns]
  const int tile_size = (out + in) * kBackwardColumns;
  for (int i = threadIdx.x; i < out * in; i += threads) {
    const int l2 = i / kMicro % out, l1 = i / kMicro / out * kMicro + i % kMicro;
    w[i] = l2 < layers_out && l1 < set_layers ? task.w[l2 * task.w_row + first_in + l1] : 0.0f;
  }
  for (int i = threadIdx.x; i < 2 * tile_size; i += threads) tiles[i] = Storage<type>::narrow(0.0f);  // the padding
  __syncthreads();

  const auto start = [&](int tile, One* to) {
    const int64_t column = int64_t{tile} * kBackwardColumns + lane * kVector;
    fetch<type>(task.G, layers_out, elements, column, aligned, warp, threads / kWarp, to);
    const One* U = static_cast<const One*>(task.U) + first_in * elements;
    if (task.dw) {
      fetch<type>(U, set_layers, elements, column, aligned, warp, threads / kWarp, to + out * kBackwardColumns);
    }
    __pipeline_commit();
  };

  float dw[kChunk * kMicro] = {};
  int now = 0, turn = 0;
  start(block, tiles);
  for (int tile = block; tile < count; tile += blocks) {
    __pipeline_wait_prior(0);
    __syncthreads();  // all copies are there, and the tile before has been used up
    if (tile + blocks < count) start(tile + blocks, tiles + tile_size - now);
    const One* g_tile = tiles + now;
    const bool mixes = task.mixed && turn == own;  // chunks take turns: a thread sums over all of G's layers
    float u[kMicro][kVector], m[kMicro][kVector] = {};
#pragma unroll
    for (int j = 0; j < kMicro; ++j) read<type>(g_tile + (out + group + j) * kBackwardColumns, u[j]);
    for (int first = 0; first < out; first += chunk) {
      const One* layers = g_tile + first * kBackwardColumns;
      const float4* four = shared + warp % groups * out + first;
      const bool sums = task.dw && first == own;
      const int some = min(chunk, out - first);
      if (sums && mixes) {
        use_layers<type, true, true>(layers, some, four, u, m, dw);
      } else if (sums) {
        use_layers<type, true, false>(layers, some, four, u, m, dw);
      } else if (mixes) {
        use_layers<type, false, true>(layers, some, four, u, m, dw);
      }
    }
    if (mixes) {
      int layer = first_in + group;
      asm volatile("" : "+r"(layer));  // else what follows from it takes registers all the time, which are short
      const int64_t column = int64_t{tile} * kBackwardColumns + lane * kVector;
#pragma unroll
      for (int j = 0; j < kMicro; ++j) {
        const int64_t to = (layer + j) * elements + column;
        if (group + j >= set_layers) break;
        if (aligned) {
          if (column < elements) store<type>(task.mixed, to, m[j]);
        } else {
#pragma unroll
          for (int c = 0; c < kVector; ++c) {
            const float v[1] = {m[j][c]};
            if (column + c < elements) store<type>(task.mixed, to + c, v);
          }
        }
      }
    }
    now = tile_size - now;
    turn = turn + chunk < out ? turn + chunk : 0;
  }

  if (!task.dw) return;
  add_lanes<kWarp / 2>(dw, lane);
#pragma unroll
  for (int i = 0; i < kChunk * kMicro / kWarp; ++i) {
    const int at = lane * (kChunk * kMicro / kWarp) + i, l2 = at / kMicro, l1 = group + at % kMicro;
    if (l2 < chunk && own + l2 < layers_out && l1 < set_layers) {
      task.partials[(int64_t{block} * layers_out + own + l2) * layers_in + first_in + l1] = dw[i];
    }
  }
}

// dw[i] = sum over blocks of partials[block][i]: a warp's lanes take neighbouring i, its warps every 32nd block.
__global__ void __launch_bounds__(kWarp* kWarp)
    sum_partials_kernel(const float* partials, int64_t blocks, int count, float* dw) {
  __shared__ float sums[kWarp][kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, i = blockIdx.x * kWarp + lane;
  float sum = 0.0f;
#pragma unroll 8
  for (int64_t block = warp; i < count && block < blocks; block += kWarp) sum += partials[block * count + i];
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || i >= count) return;
  sum = 0.0f;
#pragma unroll
  for (int k = 0; k < kWarp; ++k) sum += sums[k][lane];
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

void launch_mix_backward(const MixBackward& task, cudaStream_t stream) {
  const int64_t size = type_size(task.type), count = int64_t{task.layers_in} * task.layers_out;
  const MixBackwardPlan plan = mix_backward_plan(task.layers_in, task.layers_out, task.elements, size);
  const bool whole = task.elements % kVector == 0 && aligned(task.G, kVector * size) &&
                     aligned(task.U, kVector * size) && aligned(task.mixed, kVector * size);
  auto* kernel = task.type == kFloat32    ? mix_backward_kernel<kFloat32>
                 : task.type == kBFloat16 ? mix_backward_kernel<kBFloat16>
                                          : mix_backward_kernel<kFloat16>;
  // Global memory is read once, so the first-level cache may all be shared memory. What is refused shows at the launch.
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared_bytes);
  cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  kernel<<<plan.blocks * plan.sets, plan.threads, plan.shared_bytes, stream>>>(task, plan, whole);
  if (task.dw) {
    const int64_t blocks = ceil_div(count, kWarp);
    sum_partials_kernel<<<blocks, kWarp * kWarp, 0, stream>>>(task.partials, plan.blocks, count, task.dw);
  }
}

}  // namespace growkit
