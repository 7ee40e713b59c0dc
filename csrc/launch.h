// Launch plans and index arithmetic of every kernel in this folder. Host-only C++17 with no torch and no CUDA header:
// the kernels compile it for the device, bindings.cpp for Python, and the tests for the host alone.
#pragma once

#include <cstdint>
#include <initializer_list>

#ifdef __CUDACC__
#define GROWKIT_HD __host__ __device__ __forceinline__
#else
#define GROWKIT_HD inline
#endif

namespace growkit {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 2147483647;  // grid.x; no kernel uses grid.y

enum Type : int32_t { kFloat32, kBFloat16, kFloat16 };

GROWKIT_HD int64_t ceil_div(int64_t n, int64_t d) { return (n + d - 1) / d; }

// Quotient and remainder; 64-bit division costs several times the 32-bit one, and most tensors do not need it.
GROWKIT_HD void divide(int64_t n, int64_t d, int64_t& quotient, int64_t& remainder) {
  if (((n | d) >> 32) == 0) {
    quotient = static_cast<uint32_t>(n) / static_cast<uint32_t>(d);
    remainder = static_cast<uint32_t>(n) - static_cast<uint32_t>(quotient) * static_cast<uint32_t>(d);
  } else {
    quotient = n / d;
    remainder = n - quotient * d;
  }
}

// --- mix + assemble: y[l2][r, c] = row_scale[r] column_scale[c] sum_l1 w[l2, l1] x[l1][r, c]

constexpr int kVector = 4;  // elements per thread on the vector path
constexpr int kTile = 32;   // edge of a tile on the transposed path
constexpr int kTileRows = kThreads / kTile;
constexpr int kTileParts = kTile / kTileRows;
constexpr int kDeepTargets = 8;  // targets that a deep job sums at a time
constexpr int kMaxJobs = 64;     // both limits: a launch's arguments are at most 32,764 bytes
constexpr int kMaxTargets = 2800;
constexpr int kMixMaxLayersIn = 32;    // what a thread holds in registers, four of each on the vector path
constexpr int kMixMaxLayersOut = 256;  // w, padded to 32 columns, is at most 32 KiB of shared memory

// Three ways of walking one job. vector: four neighbours of a row per thread, every access 64 or 128 bits. scalar: one
// element per thread, any strides. transposed: 32 x 32 tiles through shared memory, for targets stored column by
// column.
enum MixPath : int32_t { kVectorPath, kScalarPath, kTransposedPath };

struct MixJob {
  const void* x;
  const float* w;             // null: the layers stay as they are (L2 = L1)
  const float* row_scale;     // null: 1
  const float* column_scale;  // null: 1
  int64_t rows, columns;
  int64_t x_layer, x_row, x_column;  // strides in elements
  int64_t y_row, y_column;
  int64_t w_row;
  int64_t first_block;  // of this job in its launch
  int32_t layers_in, layers_out;
  int32_t first_target;  // in the launch's pointer table
  int32_t x_type, y_type, path;
};

struct MixLaunch {
  MixJob jobs[kMaxJobs];
  void* targets[kMaxTargets];
  int64_t blocks;
  int32_t count;                  // of jobs
  int32_t used;                   // of targets
  int32_t layers_in, layers_out;  // the most of any job with a w that is not deep
};
static_assert(sizeof(MixLaunch) <= 32764, "kernel arguments are limited to 32,764 bytes");

// A job too large for registers or shared memory: x is read once for every kDeepTargets targets, one element per
// thread.
GROWKIT_HD bool is_deep(const MixJob& job) {
  return job.w && (job.layers_in > kMixMaxLayersIn || job.layers_out > kMixMaxLayersOut);
}

GROWKIT_HD int64_t type_size(int32_t type) { return type == kFloat32 ? 4 : 2; }

template <typename T>
GROWKIT_HD void swap_values(T& a, T& b) {
  T t = a;
  a = b;
  b = t;
}

// A vector given as one column becomes a row, and a job that is one run of memory on both sides becomes one row.
inline void simplify(MixJob& job) {
  if (job.columns == 1) {
    swap_values(job.rows, job.columns);
    swap_values(job.x_row, job.x_column);
    swap_values(job.y_row, job.y_column);
    swap_values(job.row_scale, job.column_scale);
  }
  const bool x_run = job.rows == 1 || (job.x_column == 1 && job.x_row == job.columns);
  const bool y_run = job.rows == 1 || (job.y_column == 1 && job.y_row == job.columns);
  if (job.rows != 1 && x_run && y_run && !job.row_scale && !job.column_scale) {
    job.columns *= job.rows;
    job.rows = 1;
  }
}

inline bool aligned(const void* pointer, int64_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

inline MixPath mix_path(const MixJob& job, void* const* targets) {
  if (is_deep(job)) return kScalarPath;
  const bool rows_apart = job.rows > 1;
  bool whole = job.x_column == 1 && job.y_column == 1 && job.columns % kVector == 0 && job.x_layer % kVector == 0 &&
               (!rows_apart || (job.x_row % kVector == 0 && job.y_row % kVector == 0)) &&
               aligned(job.x, kVector * type_size(job.x_type));
  for (int32_t l = 0; whole && l < job.layers_out; ++l) {
    whole = aligned(targets[l], kVector * type_size(job.y_type));
  }
  if (whole) return kVectorPath;
  return job.y_row == 1 && job.y_column != 1 && rows_apart && job.columns > 1 ? kTransposedPath : kScalarPath;
}

inline int64_t mix_blocks(const MixJob& job) {
  if (job.rows <= 0 || job.columns <= 0 || job.layers_out <= 0) return 0;
  if (job.path == kTransposedPath) return ceil_div(job.rows, kTile) * ceil_div(job.columns, kTile);
  const int64_t width = job.path == kVectorPath ? kVector : 1;
  return ceil_div(job.rows * (job.columns / width), kThreads);
}

// The kernel is compiled for these numbers of layers in registers; the least that holds a launch's jobs serves them.
inline int mix_instance(int64_t layers_in) {
  for (int instance : {8, 12, 16, 24}) {
    if (layers_in <= instance) return instance;
  }
  return kMixMaxLayersIn;
}

inline int64_t mix_shared_bytes(int instance, int64_t layers_out) {
  const int64_t tiles = 2 * kTile * (kTile + 1) * 4;  // two, so that one barrier a target is enough
  return tiles + 4 * layers_out * instance;
}

// Puts `job` and its targets into `launch`. False: there is no room, launch what is there and begin anew.
inline bool add_job(MixLaunch& launch, MixJob job, void* const* targets) {
  const int64_t blocks = mix_blocks(job);
  if (launch.count == kMaxJobs || launch.used + job.layers_out > kMaxTargets || launch.blocks + blocks > kMaxBlocks) {
    return false;
  }
  if (blocks == 0) return true;
  job.first_block = launch.blocks;
  job.first_target = launch.used;
  for (int32_t l = 0; l < job.layers_out; ++l) launch.targets[launch.used++] = targets[l];
  launch.jobs[launch.count++] = job;
  launch.blocks += blocks;
  if (job.w && !is_deep(job)) {
    if (job.layers_in > launch.layers_in) launch.layers_in = job.layers_in;
    if (job.layers_out > launch.layers_out) launch.layers_out = job.layers_out;
  }
  return true;
}

GROWKIT_HD int32_t mix_job(const MixLaunch& launch, int64_t block) {
  int32_t low = 0, high = launch.count - 1;  // the last job whose first block is not after this one
  while (low < high) {
    const int32_t middle = (low + high + 1) / 2;
    if (launch.jobs[middle].first_block <= block) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

struct Place {
  int64_t row, column;
  bool inside;
};

// Vector and scalar path: the first element of a thread. block counts from the job's own first one.
GROWKIT_HD Place mix_place(const MixJob& job, int64_t block, int thread) {
  const int64_t width = job.path == kVectorPath ? kVector : 1;
  const int64_t item = block * kThreads + thread, per_row = job.columns / width;
  Place place{0, item, item < job.rows * per_row};
  if (job.rows > 1) divide(item, per_row, place.row, place.column);
  place.column *= width;
  return place;
}

// Transposed path: element `part` of a thread. along_rows: neighbours in a warp are neighbours in a column of the tile.
GROWKIT_HD Place mix_tile_place(const MixJob& job, int64_t block, int thread, int part, bool along_rows) {
  const int fast = thread % kTile, slow = thread / kTile + part * kTileRows;
  Place place;
  divide(block, ceil_div(job.columns, kTile), place.row, place.column);
  place.row = place.row * kTile + (along_rows ? fast : slow);
  place.column = place.column * kTile + (along_rows ? slow : fast);
  place.inside = place.row < job.rows && place.column < job.columns;
  return place;
}

// --- backward of the mix: Gm[l1] = sum_l2 w[l2, l1] G[l2] and dw[l2, l1] = <G[l2], U[l1]> in one pass over both

constexpr int kWarp = 32;
constexpr int kMixMaxLayersBackward = 64;
constexpr int kMicro = 4;                          // layers of U for which a thread sums Gm and dw
constexpr int kChunk = 24;                         // layers of G, at most, for dw: 24 * 4 sums in registers
constexpr int kBackwardColumns = kWarp * kVector;  // of a tile: four for each lane of a warp
constexpr int kBackwardWarps = 12;                 // of a block, at most: 168 registers a thread
constexpr int64_t kPartials = 1056;  // 8 blocks for each of the 132 multiprocessors of H100 and H200; fixed, so that
                                     // the sums do not depend on the device

GROWKIT_HD int64_t padded_layers(int64_t layers) { return ceil_div(layers, kMicro) * kMicro; }

// A block has a warp for each group of kMicro layers of U and each chunk of G's layers. All of them read its tile, of
// which shared memory holds two: the next one is on its way while one is used.
struct MixBackwardPlan {
  int64_t sets;    // of groups: each set has blocks of its own, which read all of G
  int64_t groups;  // to a set
  int64_t chunks;
  int64_t chunk;  // layers of G to a chunk, a multiple of kMicro
  int64_t tiles;
  int64_t blocks;  // of a set; block b takes tiles b, b + blocks, ...
  int64_t threads;
  int64_t shared_bytes;
  int64_t workspace;  // floats: dw of each block
};

inline MixBackwardPlan mix_backward_plan(int64_t layers_in, int64_t layers_out, int64_t elements, int64_t size) {
  MixBackwardPlan plan;
  plan.chunks = ceil_div(layers_out, kChunk);
  plan.chunk = plan.chunks ? padded_layers(ceil_div(layers_out, plan.chunks)) : 0;
  const int64_t groups = ceil_div(layers_in, kMicro);
  plan.sets = plan.chunks ? ceil_div(groups, kBackwardWarps / plan.chunks) : 0;
  plan.groups = plan.sets ? ceil_div(groups, plan.sets) : 0;
  plan.tiles = ceil_div(elements, kBackwardColumns);
  plan.blocks = plan.tiles < kPartials ? plan.tiles : kPartials;
  plan.threads = kWarp * plan.groups * plan.chunks;
  const int64_t in = kMicro * plan.groups, out = padded_layers(layers_out);
  plan.shared_bytes = 4 * out * in + 2 * (out + in) * kBackwardColumns * size;  // w and two tiles
  plan.workspace = plan.blocks * layers_in * layers_out;
  return plan;
}

// --- gather: y[l, r, c] = x[layers[l], rows[r], columns[c]], one unit of memory at a time

constexpr int kGatherColumns = 4;  // of a thread, which finds their places in x once, for
constexpr int kGatherRows = 16;    // this many rows of a layer,
constexpr int kGatherFlight = 4;   // so many at a time

// A warp takes a tile of kGatherColumns * lanes neighbouring columns and kGatherRows * (32 / lanes) rows.
struct GatherPlan {
  int64_t unit;    // bytes moved at a time
  int64_t lanes;   // of a warp, along the columns: a power of two, 32 except where there are few columns
  int64_t across;  // tiles to a row
  int64_t down;    // tiles to a layer's column
  int64_t blocks;
};

// columns: of the result, in elements; whole: no column index, unit column strides and 16-byte aligned rows on both
// sides.
inline GatherPlan gather_plan(int64_t layers, int64_t rows, int64_t columns, int64_t element, bool whole) {
  GatherPlan plan;
  plan.unit = whole && columns * element % 16 == 0 ? 16 : element;
  const int64_t units = columns * element / plan.unit;
  plan.lanes = 1;
  while (plan.lanes < kWarp && plan.lanes * kGatherColumns < units) plan.lanes *= 2;
  plan.across = ceil_div(units, plan.lanes * kGatherColumns);
  plan.down = ceil_div(rows, kWarp / plan.lanes * kGatherRows);
  plan.blocks = ceil_div(layers * plan.down * plan.across, kThreads / kWarp);
  return plan;
}

struct GatherPlace {  // of a thread
  int64_t layer, row, column;     // the first, in units
  int64_t next_row, next_column;  // from each to the next
};

GROWKIT_HD GatherPlace gather_place(const GatherPlan& plan, int64_t block, int thread) {
  const int lanes = static_cast<int>(plan.lanes), lane = thread % kWarp;
  GatherPlace place;
  int64_t rest;
  divide(block * (kThreads / kWarp) + thread / kWarp, plan.across, rest, place.column);
  divide(rest, plan.down, place.layer, place.row);
  place.next_row = kWarp / lanes;
  place.next_column = lanes;
  place.row = place.row * kGatherRows * place.next_row + lane / lanes;
  place.column = place.column * kGatherColumns * lanes + lane % lanes;
  return place;
}

}  // namespace growkit
