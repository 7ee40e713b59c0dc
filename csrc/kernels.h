// What expand.cu calls: one launcher per kernel, on plain pointers.
#pragma once

#include <cuda_runtime.h>

#include "launch.h"

namespace growkit {

void launch_mix(const MixLaunch& launch, cudaStream_t stream);

struct Stack {  // [layers, rows, columns], columns adjacent
  const void* data;
  int64_t layer, row;  // strides in elements
};

// mixed and dw may be null; columns: rows of one run are columns * 1. partials: mix_backward_plan(...).workspace
// floats.
void launch_mix_backward(int64_t layers_in, int64_t layers_out, int64_t rows, int64_t columns, Type type, Stack G,
                         Stack U, Stack mixed, const float* w, int64_t w_row, float* dw, float* partials,
                         cudaStream_t stream);

struct Gather {
  const void* x;
  void* y;
  const int64_t *layers, *rows, *columns;                      // null: in order
  int64_t x_layers, x_rows, x_columns;                         // sizes, to check indices against
  int64_t layer_count, row_count, column_count;                // of the result, columns in units
  int64_t x_layer, x_row, x_column, y_layer, y_row, y_column;  // strides in units
};

void launch_gather(const Gather& gather, const GatherPlan& plan, cudaStream_t stream);

// x: [n, k, m] with these strides in elements; the strides are not read where the plan's width is not 1.
void launch_split(const float* x, float* y, int64_t n, int64_t k, int64_t m, const int64_t strides[3], bool runs,
                  bool right, const SplitPlan& plan, cudaStream_t stream);

}  // namespace growkit
