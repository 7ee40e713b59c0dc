// The CUDA kernels of csrc/, run on the host through cuda_on_host/, against plain loops in double. Compiled from a copy
// of csrc/ in which launches are function calls; see test_build.py.
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "expect.h"
#include "gather.cu"
#include "mix.cu"
#include "split.cu"

using namespace growkit;

static std::mt19937 generator(0);
static std::vector<float> random_values(int64_t n) {
  std::uniform_real_distribution<float> uniform(-1, 1);
  std::vector<float> values(n);
  for (float& v : values) v = uniform(generator);
  return values;
}

// Memory of one of the three types, aligned to 16 bytes plus `shift` elements, filled with 7.
struct Memory {
  Type type;
  std::vector<float4> raw;
  char* data;

  Memory(Type type, int64_t n, int64_t shift = 0) : type(type), raw((n + shift) / 4 + 2) {
    data = reinterpret_cast<char*>(raw.data()) + shift * type_size(type);
    for (int64_t i = 0; i < n; ++i) set(i, 7);
  }
  void set(int64_t i, float v) {
    if (type == kFloat32) {
      reinterpret_cast<float*>(data)[i] = v;
    } else {
      reinterpret_cast<__nv_bfloat16*>(data)[i] = __float2bfloat16_rn(v);
    }
  }
  float get(int64_t i) const {
    return type == kFloat32 ? reinterpret_cast<float*>(data)[i]
                            : __bfloat162float(reinterpret_cast<__nv_bfloat16*>(data)[i]);
  }
};

static bool close(float got, double expected, Type type, double scale) {
  return std::abs(got - expected) <= (type == kFloat32 ? 2e-6 : 1e-2) * scale;
}

struct MixCase {
  int64_t layers_in, layers_out, rows, columns, pad, shift;
  bool depth, scaled, transposed;
  Type x_type, y_type;
};

static void mix_cases(const std::vector<MixCase>& cases) {
  struct Kept {
    MixCase c;
    Memory x, y;
    std::vector<float> w, row_scale, column_scale;
    int64_t layer, y_row, y_column;
  };
  std::vector<std::unique_ptr<Kept>> kept;
  const auto launch = std::make_unique<MixLaunch>();
  for (const MixCase& c : cases) {
    const int64_t pitch = c.columns + c.pad, y_layer = c.transposed ? c.columns * (c.rows + c.pad) : c.rows * pitch;
    kept.push_back(std::unique_ptr<Kept>(new Kept{
        c, Memory(c.x_type, c.layers_in * c.rows * pitch, c.shift), Memory(c.y_type, c.layers_out * y_layer, c.shift),
        random_values(c.layers_in * c.layers_out), random_values(c.rows), random_values(c.columns), y_layer,
        c.transposed ? 1 : pitch, c.transposed ? c.rows + c.pad : 1}));
    Kept& k = *kept.back();
    for (int64_t i = 0; i < c.layers_in * c.rows * pitch; ++i) k.x.set(i, random_values(1)[0]);
    MixJob job{};
    job.x = k.x.data;
    job.w = c.depth ? k.w.data() : nullptr;
    job.w_row = c.layers_in;
    job.row_scale = c.scaled ? k.row_scale.data() : nullptr;
    job.column_scale = c.scaled ? k.column_scale.data() : nullptr;
    job.rows = c.rows;
    job.columns = c.columns;
    job.x_layer = c.rows * pitch;
    job.x_row = pitch;
    job.x_column = 1;
    job.y_row = k.y_row;
    job.y_column = k.y_column;
    job.layers_in = c.layers_in;
    job.layers_out = c.layers_out;
    job.x_type = c.x_type;
    job.y_type = c.y_type;
    std::vector<void*> targets;
    for (int64_t l = 0; l < c.layers_out; ++l) targets.push_back(k.y.data + l * y_layer * type_size(c.y_type));
    simplify(job);
    job.path = mix_path(job, targets.data());
    EXPECT(add_job(*launch, job, targets.data()), "all cases fit in one launch");
  }
  launch_mix(*launch, nullptr);
  for (const auto& k : kept) {
    const MixCase& c = k->c;
    const int64_t pitch = c.columns + c.pad;
    std::vector<bool> written(c.layers_out * k->layer);
    for (int64_t l2 = 0; l2 < c.layers_out; ++l2) {
      for (int64_t i = 0; i < c.rows; ++i) {
        for (int64_t j = 0; j < c.columns; ++j) {
          double sum = 0;
          for (int64_t l1 = 0; l1 < c.layers_in; ++l1) {
            const double weight = c.depth ? k->w[l2 * c.layers_in + l1] : l1 == l2;
            sum += weight * k->x.get((l1 * c.rows + i) * pitch + j);
          }
          if (c.scaled) sum *= k->row_scale[i] * k->column_scale[j];
          const int64_t at = l2 * k->layer + i * k->y_row + j * k->y_column;
          written[at] = true;
          EXPECT(close(k->y.get(at), sum, c.y_type, c.layers_in),
                 "mix %ld->%ld of %ld x %ld: [%ld, %ld, %ld] is %g, not %g", c.layers_in, c.layers_out, c.rows,
                 c.columns, l2, i, j, k->y.get(at), sum);
        }
      }
    }
    for (size_t i = 0; i < written.size(); ++i) EXPECT(written[i] || k->y.get(i) == 7, "padding %zu was written", i);
  }
}

static void backward_case(int64_t layers_in, int64_t layers_out, int64_t rows, int64_t columns, Type type, bool needs_x,
                          bool needs_w) {
  const int64_t n = rows * columns;
  Memory G(type, layers_out * n), U(type, layers_in * n), mixed(type, layers_in * n + 4);
  for (int64_t i = 0; i < layers_out * n; ++i) G.set(i, random_values(1)[0]);
  for (int64_t i = 0; i < layers_in * n; ++i) U.set(i, random_values(1)[0]);
  const std::vector<float> w = random_values(layers_in * layers_out);
  std::vector<float> dw(layers_in * layers_out + 1, 7),
      partials(mix_backward_plan(layers_in, layers_out, n).workspace, 7);
  launch_mix_backward(layers_in, layers_out, rows, columns, type, {G.data, n, columns}, {U.data, n, columns},
                      {needs_x ? mixed.data : nullptr, n, columns}, w.data(), layers_in, needs_w ? dw.data() : nullptr,
                      needs_w ? partials.data() : nullptr, nullptr);
  for (int64_t l1 = 0; needs_x && l1 < layers_in; ++l1) {
    for (int64_t i = 0; i < n; ++i) {
      double sum = 0;
      for (int64_t l2 = 0; l2 < layers_out; ++l2) sum += w[l2 * layers_in + l1] * G.get(l2 * n + i);
      EXPECT(close(mixed.get(l1 * n + i), sum, type, layers_out),
             "mixed %ld->%ld of %ld x %ld: [%ld, %ld] is %g, not %g", layers_in, layers_out, rows, columns, l1, i,
             mixed.get(l1 * n + i), sum);
    }
  }
  for (int64_t l2 = 0; needs_w && l2 < layers_out; ++l2) {
    for (int64_t l1 = 0; l1 < layers_in; ++l1) {
      double sum = 0;
      for (int64_t i = 0; i < n; ++i) sum += G.get(l2 * n + i) * U.get(l1 * n + i);
      const float got = dw[l2 * layers_in + l1];
      EXPECT(close(got, sum, kFloat32, std::sqrt(n) + 1), "dw %ld->%ld of %ld x %ld: [%ld, %ld] is %g, not %g",
             layers_in, layers_out, rows, columns, l2, l1, got, sum);
    }
  }
  for (int i = 0; i < 4; ++i) EXPECT(mixed.get(layers_in * n + i) == 7, "written beyond the end");
  EXPECT(dw.back() == 7, "written beyond the end");
}

template <typename T>
static void gather_case(int64_t rows, int64_t columns, int mask) {
  const int64_t layers = 3, size[3] = {layers, rows, columns};
  const int64_t in[3] = {layers + 1, rows + 2, mask & 4 ? columns + 3 : columns};
  std::vector<int64_t> index[3];
  for (int axis = 0; axis < 3; ++axis) {
    for (int64_t i = 0; i < size[axis]; ++i) index[axis].push_back(mask >> axis & 1 ? generator() % in[axis] : i);
  }
  alignas(16) static T x[64 * 1024], y[64 * 1024];
  for (int64_t i = 0; i < in[0] * in[1] * in[2]; ++i) x[i] = static_cast<T>(generator());
  std::memset(y, 7, sizeof(y));
  const bool whole = !(mask & 4) && columns * sizeof(T) % 16 == 0;
  const GatherPlan plan = gather_plan(layers, rows, columns, sizeof(T), whole);
  const int64_t per = plan.unit / sizeof(T);
  const auto of = [&](int axis) { return mask >> axis & 1 ? index[axis].data() : nullptr; };
  launch_gather({x, y, of(0), of(1), of(2), in[0], in[1], in[2], layers, rows, columns / per, in[1] * in[2] / per,
                 in[2] / per, 1, rows * columns / per, columns / per, 1},
                plan, nullptr);
  for (int64_t l = 0; l < layers; ++l) {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < columns; ++c) {
        EXPECT(y[(l * rows + r) * columns + c] == x[(index[0][l] * in[1] + index[1][r]) * in[2] + index[2][c]],
               "gather [%ld, %ld, %ld] of %ld x %ld, mask %d", l, r, c, rows, columns, mask);
      }
    }
  }
  T seven;
  std::memset(&seven, 7, sizeof(T));
  EXPECT(y[layers * rows * columns] == seven, "written beyond the end");
}

static void split_case(int64_t n, int64_t k, int64_t m, bool strided, bool right) {
  const int64_t strides[3] = {k * m, strided ? 1 : m, strided ? k : 1};
  Memory x(kFloat32, n * k * m), y(kFloat32, 3 * n * k * m + 1);
  for (int64_t i = 0; i < n * k * m; ++i) x.set(i, random_values(1)[0]);
  const bool runs = !strided && k * m % 4 == 0;
  launch_split(reinterpret_cast<float*>(x.data), reinterpret_cast<float*>(y.data), n, k, m, strides, runs, right,
               split_plan(n, k, m, runs), nullptr);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < k; ++j) {
      for (int64_t l = 0; l < m; ++l) {
        float part[3];
        for (int p = 0; p < 3; ++p) part[p] = y.get((i * 3 * k + p * k + j) * m + l);
        const float v = x.get(i * strides[0] + j * strides[1] + l * strides[2]), lo = part[right], hi = part[2];
        EXPECT(part[!right] == hi && std::abs(lo) <= std::abs(hi) * 0x1p-11f &&
                   std::abs(v - hi - lo) <= std::abs(v) * 0x1p-22f,
               "split of %g is %g, %g, %g", v, part[0], part[1], part[2]);
      }
    }
  }
  EXPECT(y.get(3 * n * k * m) == 7, "written beyond the end");
}

int main() {
  for (bool backwards : {false, true}) {
    host::backwards = backwards;
    for (int64_t layers_in : {1, 6, 12, 13, 24, 31, 32}) {
      std::vector<MixCase> cases;
      for (bool transposed : {false, true}) {
        for (auto [x_type, y_type] : {std::pair{kFloat32, kFloat32}, {kFloat32, kBFloat16}, {kBFloat16, kFloat16}}) {
          cases.push_back({layers_in, 7, 33, 40, 0, 0, true, false, transposed, x_type, y_type});
          cases.push_back({layers_in, 5, 9, 37, 3, 0, true, true, transposed, x_type, y_type});
          cases.push_back({layers_in, layers_in, 10, 12, 4, 0, false, true, transposed, x_type, y_type});
          cases.push_back({layers_in, layers_in, 65, 1, 0, 1, false, false, transposed, x_type, y_type});
          cases.push_back({layers_in, 3, 1, 1030, 0, 0, true, true, transposed, x_type, y_type});
        }
        cases.push_back({33, 10, 6, 12, 0, 0, true, true, transposed, kFloat32, kFloat32});
        cases.push_back({5, 260, 2, 8, 0, 0, true, false, transposed, kFloat32, kFloat32});
        cases.push_back({2, 2, 0, 8, 0, 0, true, false, transposed, kFloat32, kFloat32});
      }
      mix_cases(cases);
    }
    for (int64_t layers_in : {1, 6, 12, 22, 40, 64}) {
      for (int64_t layers_out : {1, 5, 24, 64}) {
        backward_case(layers_in, layers_out, 7, 43, kFloat32, true, true);
        backward_case(layers_in, layers_out, 3, 130, kBFloat16, true, layers_out > 5);
        backward_case(layers_in, layers_out, 1, 1, kFloat16, layers_in > 6, true);
      }
    }
    backward_case(2, 3, 1, 1056 * 128 + 5, kFloat32, true, true);  // more tiles than blocks
    for (int mask = 0; mask < 8; ++mask) {
      for (int64_t columns : {1, 16, 33, 64}) {
        gather_case<int8_t>(5, columns, mask);
        gather_case<int16_t>(17, columns, mask);
        gather_case<int32_t>(17, columns, mask);
        gather_case<int64_t>(3, columns, mask);
      }
    }
    for (bool right : {false, true}) {
      for (bool strided : {false, true}) {
        split_case(3, 33, 1, strided, right);
        split_case(2, 16, 20, strided, right);
        split_case(1, 7, 9, strided, right);
      }
    }
  }
  std::printf("%ld checks\n", checks);
}
