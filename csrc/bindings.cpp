// growkit._C: facts of the build, and the launch plans as Python sees them. No torch type crosses here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "build.h"
#include "launch.h"

namespace py = pybind11;
using namespace growkit;

namespace {

#ifdef __VERSION__
constexpr const char* kCompiler = __VERSION__;
#else
constexpr const char* kCompiler = "unknown";
#endif

// "(800,900)" -> ["8.0", "9.0"]
std::vector<std::string> arch_names(const std::string& list) {
  std::vector<std::string> names;
  std::string digits;
  for (char c : list) {
    if (c >= '0' && c <= '9') {
      digits += c;
    } else if (digits.size() > 1) {
      const std::string number = digits.substr(0, digits.size() - 1);  // 1200 is 12.0: the last digit is always 0
      names.push_back(number.substr(0, number.size() - 1) + "." + number.back());
      digits.clear();
    }
  }
  return names;
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = kCompiler;
  info["kernels"] = &build_facts != nullptr;
  if (!&build_facts) return info;
  const BuildFacts facts = build_facts();
  info["archs"] = arch_names(facts.archs);
  info["cuda"] = std::to_string(facts.cuda_major) + "." + std::to_string(facts.cuda_minor);
  info["torch"] = std::to_string(facts.torch_target >> 56) + "." + std::to_string(facts.torch_target >> 48 & 255);
  info["stream_found"] = facts.stream_found;
  return info;
}

void check(bool good, const char* message) {
  if (!good) throw std::invalid_argument(message);
}

// A job on invented addresses: only their alignment matters to a plan.
MixJob mix_job_of(int64_t layers_in, int64_t layers_out, int64_t rows, int64_t columns, std::vector<int64_t> x_strides,
                  std::vector<int64_t> y_strides, int64_t misaligned) {
  check(layers_in >= 0 && layers_out >= 0 && rows >= 0 && columns >= 0, "mix_plan: sizes must not be negative");
  check(x_strides.size() == 3 && y_strides.size() == 2, "mix_plan: x_strides must be three, y_strides two");
  static const float w[1] = {};
  MixJob job{};
  job.x = reinterpret_cast<const void*>(4096 + misaligned);
  job.w = w;
  job.rows = rows;
  job.columns = columns;
  job.x_layer = x_strides[0];
  job.x_row = x_strides[1];
  job.x_column = x_strides[2];
  job.y_row = y_strides[0];
  job.y_column = y_strides[1];
  job.layers_in = layers_in;
  job.layers_out = layers_out;
  simplify(job);
  const std::vector<void*> targets(layers_out, reinterpret_cast<void*>(8192));
  job.path = mix_path(job, targets.data());
  return job;
}

py::dict mix_plan(int64_t layers_in, int64_t layers_out, int64_t rows, int64_t columns, std::vector<int64_t> x_strides,
                  std::vector<int64_t> y_strides, int64_t misaligned) {
  const MixJob job = mix_job_of(layers_in, layers_out, rows, columns, x_strides, y_strides, misaligned);
  const int instance = mix_instance(is_deep(job) ? 0 : layers_in);
  py::dict plan;
  plan["path"] = job.path == kVectorPath ? "vector" : job.path == kScalarPath ? "scalar" : "transposed";
  plan["deep"] = is_deep(job);
  plan["rows"] = job.rows;
  plan["columns"] = job.columns;
  plan["grid"] = mix_blocks(job);
  plan["block"] = kThreads;
  plan["layers"] = instance;
  plan["shared_bytes"] = mix_shared_bytes(instance, is_deep(job) ? 0 : layers_out);
  plan["workspace"] = 0;
  return plan;
}

// Offsets in the target of everything that one block writes, in the order of threads and parts.
std::vector<int64_t> mix_offsets(int64_t layers_in, int64_t layers_out, int64_t rows, int64_t columns,
                                 std::vector<int64_t> x_strides, std::vector<int64_t> y_strides, int64_t misaligned,
                                 int64_t block) {
  const MixJob job = mix_job_of(layers_in, layers_out, rows, columns, x_strides, y_strides, misaligned);
  const bool tiles = job.path == kTransposedPath;
  const int parts = tiles ? kTileParts : 1, width = job.path == kVectorPath ? kVector : 1;
  std::vector<int64_t> offsets;
  for (int thread = 0; thread < kThreads; ++thread) {
    for (int part = 0; part < parts; ++part) {
      const Place at = tiles ? mix_tile_place(job, block, thread, part, true) : mix_place(job, block, thread);
      for (int i = 0; at.inside && i < width; ++i) {
        offsets.push_back(at.row * job.y_row + (at.column + i) * job.y_column);
      }
    }
  }
  return offsets;
}

py::dict mix_backward_plan_of(int64_t layers_in, int64_t layers_out, int64_t elements) {
  check(layers_in >= 0 && layers_in <= kMixMaxLayersBackward && layers_out >= 0 && layers_out <= kMixMaxLayersBackward,
        "mix_backward_plan: layers must be 0 to 64");
  check(elements >= 0, "mix_backward_plan: elements must not be negative");
  const MixBackwardPlan p = mix_backward_plan(layers_in, layers_out, elements);
  py::dict plan;
  plan["grid"] = p.blocks;
  plan["block"] = kThreads;
  plan["shared_bytes"] = p.shared_bytes;
  plan["workspace"] = 4 * p.workspace;
  plan["columns"] = p.columns;
  plan["tiles"] = p.tiles;
  plan["pieces"] = p.micro_tiles;
  plan["lanes"] = p.lanes;
  return plan;
}

py::dict gather_plan_of(int64_t layers, int64_t rows, int64_t columns, int64_t element, bool whole) {
  check(layers >= 0 && rows >= 0 && columns >= 0 && element > 0, "gather_plan: sizes must not be negative");
  const GatherPlan p = gather_plan(layers, rows, columns, element, whole);
  py::dict plan;
  plan["grid"] = p.blocks;
  plan["block"] = kThreads;
  plan["shared_bytes"] = 0;
  plan["workspace"] = 0;
  plan["unit"] = p.unit;
  return plan;
}

py::dict split_plan_of(int64_t n, int64_t k, int64_t m, bool runs) {
  check(n >= 0 && k >= 0 && m >= 0, "split_plan: sizes must not be negative");
  const SplitPlan p = split_plan(n, k, m, runs);
  py::dict plan;
  plan["grid"] = p.blocks;
  plan["block"] = kThreads;
  plan["shared_bytes"] = 0;
  plan["workspace"] = 12 * n * k * m;
  plan["width"] = p.width;
  return plan;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() =
      "Facts of the build, and the launch plans of the CUDA kernels. Importing it registers the kernels with torch.";
  m.attr("MAX_LAYERS_BACKWARD") = kMixMaxLayersBackward;
  m.def("build_info", &build_info,
        "Compiler, archs, CUDA and the oldest torch, and whether torch's CUDA library was found.");
  const auto layers_in = py::arg("layers_in"), layers_out = py::arg("layers_out"), rows = py::arg("rows"),
             columns = py::arg("columns"), x_strides = py::arg("x_strides"), y_strides = py::arg("y_strides");
  m.def("mix_plan", &mix_plan, layers_in, layers_out, rows, columns, x_strides, y_strides, py::arg("misaligned") = 0,
        "Launch of one stack of float32 matrices: path, grid, block, shared memory in bytes, layers in registers.");
  m.def("mix_offsets", &mix_offsets, layers_in, layers_out, rows, columns, x_strides, y_strides,
        py::arg("misaligned") = 0, py::arg("block"), "Offsets in a target of all that one block of mix_plan writes.");
  m.def("mix_backward_plan", &mix_backward_plan_of, layers_in, layers_out, py::arg("elements"),
        "Launch of the mix's backward; workspace in bytes.");
  m.def("gather_plan", &gather_plan_of, py::arg("layers"), rows, columns, py::arg("element"), py::arg("whole"),
        "Launch of the gather for elements of so many bytes; whole: rows that are runs of 16-byte units.");
  m.def("split_plan", &split_plan_of, py::arg("n"), py::arg("k"), py::arg("m"), py::arg("runs"),
        "Launch of the 3xTF32 split; workspace: bytes of its result.");
}
