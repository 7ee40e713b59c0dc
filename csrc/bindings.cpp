// growkit._C: facts of the build, the launch plans as Python sees them, the CPU kernels, which take addresses, and
// what tensors are. No torch type crosses here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "build.h"
#include "cpu.h"
#include "launch.h"
#include "lists.h"

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
  info["torch_threads"] = on_torch_threads();
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

py::dict mix_backward_plan_of(int64_t layers_in, int64_t layers_out, int64_t elements, int64_t size) {
  check(layers_in >= 0 && layers_in <= kMixMaxLayersBackward && layers_out >= 0 && layers_out <= kMixMaxLayersBackward,
        "mix_backward_plan: layers must be 0 to 64");
  check(elements >= 0, "mix_backward_plan: elements must not be negative");
  check(size == 2 || size == 4, "mix_backward_plan: elements must have 2 or 4 bytes");
  const MixBackwardPlan p = mix_backward_plan(layers_in, layers_out, elements, size);
  py::dict plan;
  plan["grid"] = p.blocks * p.sets;
  plan["block"] = p.threads;
  plan["shared_bytes"] = p.shared_bytes;
  plan["workspace"] = 4 * p.workspace;
  plan["columns"] = kBackwardColumns;
  plan["tiles"] = p.tiles;
  plan["sets"] = p.sets;
  plan["layers"] = std::vector<int64_t>{kMicro * p.groups, p.chunk * p.chunks};  // of a block
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

template <typename T>
T* pointer(int64_t address) {
  return reinterpret_cast<T*>(static_cast<uintptr_t>(address));
}

// A row of numbers for each tensor, addresses among them; and of each list whether it is bfloat16, not float32.
using Rows = std::vector<std::vector<int64_t>>;

std::vector<Type> check_lists(const Rows& rows, size_t width, const std::vector<bool>& narrow, size_t lists) {
  check(narrow.size() == lists, "narrow: wrong number of lists");
  for (const auto& row : rows) check(row.size() == width, "tensors: wrong number of entries in a row");
  std::vector<Type> types;
  for (bool is : narrow) types.push_back(is ? kBFloat16 : kFloat32);
  return types;
}

int64_t sophia_step_of(const Rows& tensors, const std::vector<bool>& narrow, float lr, float decay, float beta1,
                       float gain, float rho_bs, float eps, float scale, bool max, bool random, uint64_t seed,
                       uint32_t stream, uint32_t time, bool nesterov) {
  const std::vector<Type> types = check_lists(tensors, 8, narrow, 4);
  std::vector<StepTensor> list;
  for (const auto& row : tensors) {
    list.push_back({pointer<void>(row[0]), pointer<void>(row[1]), pointer<void>(row[2]), pointer<void>(row[3]),
                    pointer<float>(row[4]), row[5], row[6], row[7]});
  }
  const StepOptions options{types[0], types[1], types[2], types[3], lr,    decay, beta1,
                            gain,     rho_bs,   eps,      scale,    max,   nesterov,
                            {random, seed, stream, time}};
  py::gil_scoped_release released;
  return sophia_step(list, options);
}

void gnb_ema_of(const Rows& tensors, const std::vector<bool>& narrow, float beta2, float gain, bool random,
                uint64_t seed, uint32_t stream, uint32_t time) {
  const std::vector<Type> types = check_lists(tensors, 5, narrow, 2);
  std::vector<RefreshTensor> list;
  for (const auto& row : tensors) {
    list.push_back({pointer<void>(row[0]), pointer<void>(row[1]), row[2], row[3], row[4]});
  }
  py::gil_scoped_release released;
  gnb_ema(list, {types[0], types[1], beta2, gain, {random, seed, stream, time}});
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() =
      "Facts of the build, the CPU kernels, and the launch plans of the CUDA kernels, if it was built with those.\n"
      "Importing it registers the CUDA kernels with torch.";
  m.attr("MAX_LAYERS_BACKWARD") = kMixMaxLayersBackward;
  m.def("build_info", &build_info,
        "compiler; torch_threads: whether the CPU kernels run on torch's threads; kernels: whether there are CUDA\n"
        "kernels, and of those archs, CUDA, the oldest torch, and whether torch's CUDA library was found.");
  const auto layers_in = py::arg("layers_in"), layers_out = py::arg("layers_out"), rows = py::arg("rows"),
             columns = py::arg("columns"), x_strides = py::arg("x_strides"), y_strides = py::arg("y_strides");
  m.def("mix_plan", &mix_plan, layers_in, layers_out, rows, columns, x_strides, y_strides, py::arg("misaligned") = 0,
        "Launch of one stack of float32 matrices: path, grid, block, shared memory in bytes, layers in registers.");
  m.def("mix_offsets", &mix_offsets, layers_in, layers_out, rows, columns, x_strides, y_strides,
        py::arg("misaligned") = 0, py::arg("block"), "Offsets in a target of all that one block of mix_plan writes.");
  m.def("mix_backward_plan", &mix_backward_plan_of, layers_in, layers_out, py::arg("elements"), py::arg("size"),
        "Launch of the mix's backward for elements of `size` bytes; workspace in bytes.");
  m.def("gather_plan", &gather_plan_of, py::arg("layers"), rows, columns, py::arg("element"), py::arg("whole"),
        "Launch of the gather for elements of so many bytes; whole: rows that are runs of 16-byte units.");

  m.def("use_instructions", &use_instructions, py::arg("name"),
        "Choose the instruction set of the CPU kernels by torch's name for it; returns the name of the one taken.");
  const auto tensors = py::arg("tensors"), narrow = py::arg("narrow"), random = py::arg("random"),
             seed = py::arg("seed"), stream = py::arg("stream"), time = py::arg("time");
  m.def("sophia_step", &sophia_step_of, tensors, narrow, py::kw_only(), py::arg("lr"), py::arg("decay"),
        py::arg("beta1"), py::arg("gain"), py::arg("rho_bs"), py::arg("eps"), py::arg("scale"), py::arg("max"), random,
        seed, stream, time, py::arg("nesterov") = false,
        "Sophia's update on CPU. tensors: (p, g, m, h, master or 0, elements, parameter, offset) of each, the first\n"
        "five as addresses; narrow: whether p, g, m, h are bfloat16. Returns the number of elements with |mbar| < d.");
  m.def("gnb_ema", &gnb_ema_of, tensors, narrow, py::kw_only(), py::arg("beta2"), py::arg("gain"), random, seed, stream,
        time,
        "Gauss-Newton-Bartlett refresh on CPU. tensors: (h, g, elements, parameter, offset) of each, the first two as\n"
        "addresses; narrow: whether h and g are bfloat16.");

  m.def("use_tensors", &use_tensors, py::arg("cls"), "Have describe() take tensors of this class, torch.Tensor.");
  m.def("describe", &describe, tensors,
        "(addresses, facts) of a list of tensors, as bytes: 8 for each address; class, device, dtype, sizes and strides\n"
        "of each. Raises TypeError for what is no tensor, and what torch raises for a tensor without memory.");
  m.def("referents", &referents, py::arg("references"), "What weak references refer to; None for what is gone.");
  m.def("identities", &identities, py::arg("owner"),
        "Which objects a list holds, or are the keys and values of the dictionaries in a dictionary, as bytes.");
}
