// Growth by copying: y[l, r, c] = x[layers[l], rows[r], columns[c]], bit for bit, for elements of 1 to 16 bytes.
#include "kernels.h"

namespace growkit {
namespace {

__device__ __forceinline__ int64_t source(const int64_t* index, int64_t i, int64_t size) {
  if (!index) return i;
  const int64_t j = index[i];
  if (static_cast<uint64_t>(j) >= static_cast<uint64_t>(size)) __trap();  // like an index out of range in torch
  return j;
}

template <typename Unit>
__global__ void __launch_bounds__(kThreads) gather_kernel(const Gather g) {
  const int64_t items = g.layer_count * g.row_count * g.column_count;
  Unit value[kGatherItems];
  int64_t to[kGatherItems];
#pragma unroll
  for (int part = 0; part < kGatherItems; ++part) {
    const int64_t item = gather_item(blockIdx.x, threadIdx.x, part);
    to[part] = -1;
    if (item >= items) continue;
    const GatherPlace at = gather_place(item, g.row_count, g.column_count);
    to[part] = at.layer * g.y_layer + at.row * g.y_row + at.column * g.y_column;
    const int64_t from = source(g.layers, at.layer, g.x_layers) * g.x_layer +
                         source(g.rows, at.row, g.x_rows) * g.x_row +
                         source(g.columns, at.column, g.x_columns) * g.x_column;
    value[part] = static_cast<const Unit*>(g.x)[from];
  }
#pragma unroll
  for (int part = 0; part < kGatherItems; ++part) {
    if (to[part] >= 0) static_cast<Unit*>(g.y)[to[part]] = value[part];
  }
}

}  // namespace

void launch_gather(const Gather& gather, const GatherPlan& plan, cudaStream_t stream) {
  auto* kernel = plan.unit == 16  ? gather_kernel<int4>
                 : plan.unit == 8 ? gather_kernel<int64_t>
                 : plan.unit == 4 ? gather_kernel<int32_t>
                 : plan.unit == 2 ? gather_kernel<int16_t>
                                  : gather_kernel<int8_t>;
  kernel<<<plan.blocks, kThreads, 0, stream>>>(gather);
}

}  // namespace growkit
