// What expand.cu calls: one launcher per kernel, on plain pointers.
#pragma once

#include <cuda_runtime.h>

#include "launch.h"

namespace growkit {

void launch_mix(const MixLaunch& launch, cudaStream_t stream);

struct MixBackward {
  int layers_in, layers_out;
  int64_t elements;  // of a layer; the stacks are contiguous
  Type type;         // of G, U and mixed
  const void *G, *U;
  const float* w;
  int64_t w_row;
  void* mixed;      // null: not wanted
  float* dw;        // null: not wanted, nor
  float* partials;  // mix_backward_plan(...).workspace floats
};

void launch_mix_backward(const MixBackward& task, cudaStream_t stream);

struct Gather {
  const void* x;
  void* y;
  const int64_t *layers, *rows, *columns;                      // null: in order
  int64_t x_layers, x_rows, x_columns;                         // sizes, to check indices against
  int64_t layer_count, row_count, column_count;                // of the result, columns in units
  int64_t x_layer, x_row, x_column, y_layer, y_row, y_column;  // strides in units
};

void launch_gather(const Gather& gather, const GatherPlan& plan, cudaStream_t stream);

}  // namespace growkit
