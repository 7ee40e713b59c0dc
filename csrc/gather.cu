// Growth by copying: y[l, r, c] = x[layers[l], rows[r], columns[c]], bit for bit, for elements of 1 to 16 bytes.
#include "kernels.h"

namespace growkit {
namespace {

// Where in x, in bytes, what stands at place i of y comes from; wrong becomes true where x has no such place.
template <typename Unit>
__device__ __forceinline__ int64_t source(const int64_t* index, int64_t i, int64_t size, int64_t stride, bool& wrong) {
  if (index) i = __ldg(index + i);
  wrong |= static_cast<uint64_t>(i) >= static_cast<uint64_t>(size);
  return i * stride * static_cast<int64_t>(sizeof(Unit));
}

// No load waits for a branch: in place of a row or column beyond the last the last one is read, and not stored.
template <typename Unit>
__global__ void __launch_bounds__(kThreads) gather_kernel(const Gather g, const GatherPlan plan) {
  const GatherPlace at = gather_place(plan, blockIdx.x, threadIdx.x);
  if (at.layer >= g.layer_count || at.row >= g.row_count || at.column >= g.column_count) return;

  bool wrong = false, column_inside[kGatherColumns];
  const char* column[kGatherColumns];
  const char* x = static_cast<const char*>(g.x) + source<Unit>(g.layers, at.layer, g.x_layers, g.x_layer, wrong);
#pragma unroll
  for (int i = 0; i < kGatherColumns; ++i) {
    const int64_t c = at.column + i * at.next_column;
    column_inside[i] = c < g.column_count;
    column[i] = x + source<Unit>(g.columns, column_inside[i] ? c : g.column_count - 1, g.x_columns, g.x_column, wrong);
  }
  Unit* y = static_cast<Unit*>(g.y) + at.layer * g.y_layer + at.row * g.y_row + at.column * g.y_column;
  const int64_t next_column = at.next_column * g.y_column;

  int64_t left = g.row_count - at.row;  // rows from the first on
#pragma unroll 1
  for (int first = 0; first < kGatherRows && left > 0; first += kGatherFlight) {
    int64_t row[kGatherFlight];
#pragma unroll
    for (int k = 0; k < kGatherFlight; ++k) {
      const int64_t ahead = k * at.next_row < left ? k * at.next_row : left - 1;
      row[k] = source<Unit>(g.rows, g.row_count - left + ahead, g.x_rows, g.x_row, wrong);
    }
    if (wrong) __trap();  // like an index out of range in torch

    Unit value[kGatherFlight][kGatherColumns];
#pragma unroll
    for (int k = 0; k < kGatherFlight; ++k) {
#pragma unroll
      for (int i = 0; i < kGatherColumns; ++i) {
        value[k][i] = *reinterpret_cast<const Unit*>(column[i] + row[k]);  // not __ldg, which would mix with stores
      }
    }
#pragma unroll
    for (int k = 0; k < kGatherFlight; ++k) {
      Unit* to = y;
#pragma unroll
      for (int i = 0; i < kGatherColumns; ++i) {
        if (left > 0 && column_inside[i]) __stcs(to, value[k][i]);
        to += next_column;
      }
      y += at.next_row * g.y_row;
      left -= at.next_row;
    }
  }
}

}  // namespace

void launch_gather(const Gather& gather, const GatherPlan& plan, cudaStream_t stream) {
  auto* kernel = plan.unit == 16  ? gather_kernel<int4>
                 : plan.unit == 8 ? gather_kernel<long long>  // not int64_t: CUDA's loads know this name of it
                 : plan.unit == 4 ? gather_kernel<int>
                 : plan.unit == 2 ? gather_kernel<short>
                                  : gather_kernel<signed char>;
  kernel<<<plan.blocks, kThreads, 0, stream>>>(gather, plan);
}

}  // namespace growkit
