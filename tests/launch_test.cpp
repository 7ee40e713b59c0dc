// The kernels' index arithmetic, run on the host over odd shapes: every element of every result is written exactly
// once.
#include "expect.h"
#include "launch.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

using namespace growkit;

static void* address(int64_t n) { return reinterpret_cast<void*>(n); }

static void each_once(const std::vector<int>& writes, const char* what, int64_t a, int64_t b, int64_t c) {
  for (size_t i = 0; i < writes.size(); ++i) {
    EXPECT(writes[i] == 1, "%s of %ld x %ld x %ld: element %zu is written %d times", what, a, b, c, i, writes[i]);
  }
}

// Writes of one job, numbered in the order of the caller's rows and columns, whatever simplify() made of them.
static void mix_case(int64_t rows, int64_t columns, bool transposed, int64_t pad, int64_t misaligned, int32_t layers_in,
                     int32_t layers_out) {
  static const float some_w[1] = {};
  MixJob job{};
  job.x = address(4096 + misaligned);
  job.w = some_w;
  job.rows = rows;
  job.columns = columns;
  job.x_row = columns + pad;
  job.x_column = 1;
  job.x_layer = rows * job.x_row;
  job.y_row = transposed ? 1 : columns + pad;
  job.y_column = transposed ? rows + pad : 1;
  job.layers_in = layers_in;
  job.layers_out = layers_out;
  const int64_t y_row = job.y_row, y_column = job.y_column;
  std::vector<void*> targets(layers_out, address(8192));
  simplify(job);
  job.path = mix_path(job, targets.data());
  if (is_deep(job)) EXPECT(job.path == kScalarPath, "a deep job walks element by element");
  if (job.path == kVectorPath) EXPECT(misaligned % 16 == 0, "an unaligned stack must not be read four at a time");

  const int64_t extent = rows && columns ? (rows - 1) * y_row + (columns - 1) * y_column + 1 : 0;
  std::vector<int> writes(extent, 0);
  const bool tiles = job.path == kTransposedPath;
  const int width = job.path == kVectorPath ? kVector : 1, parts = tiles ? kTileParts : 1;
  const int64_t blocks = mix_blocks(job);
  for (int64_t block = 0; block < blocks; ++block) {
    std::vector<int> read(kTile * kTile, 0);
    for (int thread = 0; thread < kThreads; ++thread) {
      for (int part = 0; part < parts; ++part) {
        const Place at = tiles ? mix_tile_place(job, block, thread, part, true) : mix_place(job, block, thread);
        for (int i = 0; at.inside && i < width; ++i) {
          const int64_t offset = at.row * job.y_row + (at.column + i) * job.y_column;
          EXPECT(offset >= 0 && offset < extent, "offset %ld of %ld", offset, extent);
          ++writes[offset];
        }
        if (tiles) {  // what is read into shared memory is what is written from it
          const Place from = mix_tile_place(job, block, thread, part, false);
          if (from.inside) ++read[from.row % kTile * kTile + from.column % kTile];
          if (at.inside) --read[at.row % kTile * kTile + at.column % kTile];
        }
      }
    }
    for (int balance : read) EXPECT(balance == 0, "a tile reads and writes different elements");
  }
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) {
      const int got = writes[r * y_row + c * y_column];
      EXPECT(got == 1, "mix of %ld x %ld: (%ld, %ld) is written %d times", rows, columns, r, c, got);
      writes[r * y_row + c * y_column] = 0;
    }
  }
  for (int left : writes) EXPECT(left == 0, "mix of %ld x %ld writes between its rows", rows, columns);
}

static void mix_launches() {
  static MixLaunch launch;
  static const float some_w[1] = {};
  launch = MixLaunch{};
  std::vector<void*> targets(48, address(8192));
  int64_t jobs = 0;
  for (;; ++jobs) {
    MixJob job{};
    job.x = address(4096);
    job.w = some_w;
    job.rows = 1 + jobs % 5;
    job.columns = jobs % 7 * 100;  // every seventh is empty
    job.x_row = job.y_row = job.columns;
    job.x_column = job.y_column = 1;
    job.layers_in = 24;
    job.layers_out = 48;
    job.path = kScalarPath;
    const int64_t blocks = launch.blocks;
    if (!add_job(launch, job, targets.data())) break;
    EXPECT(launch.blocks == blocks + mix_blocks(job), "blocks add up");
  }
  EXPECT(launch.used <= kMaxTargets && launch.count <= kMaxJobs && jobs > launch.count,
         "limits hold, empty jobs are free");
  EXPECT(launch.layers_in == 24 && launch.layers_out == 48, "the kernel's instance fits every job");
  for (int64_t block = 0, j = 0; block < launch.blocks; ++block) {
    while (j + 1 < launch.count && launch.jobs[j + 1].first_block <= block) ++j;
    EXPECT(mix_job(launch, block) == j, "block %ld belongs to job %ld", block, j);
  }
}

static void gather_case(int64_t layers, int64_t rows, int64_t columns, int64_t element, bool whole) {
  const GatherPlan plan = gather_plan(layers, rows, columns, element, whole);
  EXPECT(plan.unit == element || columns * element % plan.unit == 0, "units divide a row");
  const int64_t units = columns * element / plan.unit;
  std::vector<int> writes(layers * rows * units, 0);
  for (int64_t block = 0; block < plan.blocks; ++block) {
    for (int thread = 0; thread < kThreads; ++thread) {
      const GatherPlace at = gather_place(plan, block, thread);
      for (int k = 0; k < kGatherRows; ++k) {
        for (int i = 0; i < kGatherColumns; ++i) {
          const int64_t row = at.row + k * at.next_row, column = at.column + i * at.next_column;
          if (at.layer < layers && row < rows && column < units) ++writes[(at.layer * rows + row) * units + column];
        }
      }
    }
  }
  each_once(writes, "gather", layers, rows, columns);
}

static void backward_case(int64_t layers_in, int64_t layers_out, int64_t elements, int64_t size) {
  const MixBackwardPlan plan = mix_backward_plan(layers_in, layers_out, elements, size);
  EXPECT(plan.shared_bytes <= 99 * 1024, "shared memory %ld for %ld -> %ld", plan.shared_bytes, layers_in, layers_out);
  EXPECT(plan.threads <= kBackwardWarps * kWarp && plan.chunk <= kChunk && plan.chunk % kMicro == 0, "%ld threads",
         plan.threads);
  EXPECT(plan.blocks <= kPartials && plan.tiles * kBackwardColumns >= elements, "tiles cover all elements");
  EXPECT(plan.workspace == plan.blocks * layers_in * layers_out, "a slot per block");
  std::vector<int> dw(layers_in * layers_out, 0), tiles(plan.tiles, 0);
  for (int64_t set = 0; set < plan.sets; ++set) {
    for (int64_t warp = 0; warp < plan.groups * plan.chunks; ++warp) {
      for (int64_t i = 0; i < plan.chunk * kMicro; ++i) {
        const int64_t l2 = warp / plan.groups * plan.chunk + i / kMicro;
        const int64_t l1 = (set * plan.groups + warp % plan.groups) * kMicro + i % kMicro;
        if (l2 < layers_out && l1 < layers_in) ++dw[l2 * layers_in + l1];
      }
    }
  }
  each_once(dw, "dw", layers_out, layers_in, elements);
  for (int64_t block = 0; block < plan.blocks; ++block) {
    for (int64_t tile = block; tile < plan.tiles; tile += plan.blocks) ++tiles[tile];
  }
  each_once(tiles, "tiles", layers_in, layers_out, elements);
}

int main() {
  const int64_t sizes[] = {0, 1, 3, 4, 31, 32, 33, 63, 100, 257};
  for (int64_t rows : sizes) {
    for (int64_t columns : sizes) {
      for (bool transposed : {false, true}) {
        for (int64_t pad : {0, 1, 4}) mix_case(rows, columns, transposed, pad, 0, 6, 12);
      }
      mix_case(rows, columns, false, 0, 4, 6, 12);
      mix_case(rows, columns, true, 0, 0, 33, 12);
      for (int64_t element : {1, 2, 4, 8}) {
        gather_case(3, rows, columns, element, false);
        gather_case(2, rows, columns, element, true);
      }
    }
  }
  mix_launches();
  for (int64_t in = 1; in <= kMixMaxLayersBackward; ++in) {
    for (int64_t out = 1; out <= kMixMaxLayersBackward; ++out) backward_case(in, out, in * 1000 + out, 4);
  }
  backward_case(12, 24, int64_t{50257} * 1024, 2);

  // Beyond 2^31 elements.
  int64_t quotient, remainder;
  for (int64_t n : {int64_t{0}, int64_t{4294967295}, int64_t{4294967296}, int64_t{7000000007}, int64_t{1} << 40}) {
    for (int64_t d : {int64_t{1}, int64_t{3}, int64_t{50257}, int64_t{4294967297}}) {
      divide(n, d, quotient, remainder);
      EXPECT(quotient == n / d && remainder == n % d, "%ld / %ld", n, d);
    }
  }
  MixJob large{};
  large.rows = 70001;
  large.columns = 70004;
  large.layers_out = 1;
  large.path = kVectorPath;
  const Place last = mix_place(large, mix_blocks(large) - 1, (large.rows * large.columns / kVector - 1) % kThreads);
  EXPECT(last.inside && last.row == 70000 && last.column == 70000, "(%ld, %ld)", last.row, last.column);
  const int64_t side = int64_t{1} << 20;
  const GatherPlan plan = gather_plan(1, side, side, 4, false);
  const GatherPlace end = gather_place(plan, plan.blocks - 1, kThreads - 1);
  EXPECT(end.row == side - kGatherRows && end.column + (kGatherColumns - 1) * end.next_column == side - 1, "(%ld, %ld)",
         end.row, end.column);

  std::printf("%ld checks\n", checks);
}
