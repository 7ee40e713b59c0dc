// Entry points: each takes a schema's arguments apart, checks them, plans and launches. Registered for the CUDA key of
// ops whose schemas growkit/ops/kron.py defines; importing this library before them is harmless.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <array>
#include <memory>
#include <optional>
#include <vector>

#include "build.h"
#include "kernels.h"

// Lives in libtorch_cuda. Weak, so that this library also loads beside a torch without CUDA; whether it was found then
// depends on the link to libtorch.so, which brings libtorch_cuda in where there is one.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                   void** ret_stream);

namespace growkit {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Makes the tensors' device current for the launches in its scope, on torch's stream of that device.
class Launcher {
 public:
  Launcher(const char* op, const Tensor& tensor) : op_(op) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream, op,
                    ": torch's CUDA library was not found when growkit._C was loaded; install growkit for this torch");
    check(cudaGetDevice(&previous_));
    check(cudaSetDevice(tensor.get_device()));
    void* stream = nullptr;
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device(), &stream) == 0, op, ": no CUDA stream");
    stream_ = static_cast<cudaStream_t>(stream);
  }
  ~Launcher() { cudaSetDevice(previous_); }
  Launcher(const Launcher&) = delete;

  cudaStream_t stream() const { return stream_; }
  void done() const { check(cudaGetLastError()); }

 private:
  void check(cudaError_t error) const { STD_TORCH_CHECK(error == cudaSuccess, op_, ": ", cudaGetErrorString(error)); }

  const char* op_;
  int previous_ = 0;
  cudaStream_t stream_ = nullptr;
};

bool type_of(const Tensor& tensor, Type& type) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      type = kFloat32;
      return true;
    case ScalarType::BFloat16:
      type = kBFloat16;
      return true;
    case ScalarType::Half:
      type = kFloat16;
      return true;
    default:
      return false;
  }
}

Type check_type(const char* op, const char* name, const Tensor& tensor) {
  Type type = kFloat32;
  STD_TORCH_CHECK(type_of(tensor, type), op, ": ", name, " must be float32, bfloat16 or float16");
  return type;
}

void check_place(const char* op, const char* name, const Tensor& tensor, const Tensor& like) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device() == like.get_device(), op, ": ", name,
                  " must be on CUDA device ", static_cast<int>(like.get_device()), " as the other tensors");
}

void check_shape(const char* op, const char* name, const Tensor& tensor, std::initializer_list<int64_t> shape) {
  bool same = tensor.dim() == static_cast<int64_t>(shape.size());
  for (int64_t i = 0; same && i < tensor.dim(); ++i) same = tensor.size(i) == shape.begin()[i];
  if (same) return;
  std::ostringstream wanted, got;
  for (int64_t size : shape) wanted << " " << size;
  for (int64_t i = 0; i < tensor.dim(); ++i) got << " " << tensor.size(i);
  STD_TORCH_CHECK(false, op, ": ", name, " must have the shape [", wanted.str(), " ], got [", got.str(), " ]");
}

void check_depth(const char* op, const Tensor& w, int64_t layers_out, int64_t layers_in, const Tensor& like) {
  check_place(op, "w", w, like);
  check_shape(op, "w", w, {layers_out, layers_in});
  STD_TORCH_CHECK(w.scalar_type() == ScalarType::Float && (w.numel() == 0 || layers_in == 1 || w.stride(1) == 1), op,
                  ": w must be float32 with adjacent columns");
}

const float* vector_of(const char* name, const Tensor& scale, int64_t size, const Tensor& like) {
  constexpr const char* op = "kron_mix_";
  if (scale.numel() == 0) return nullptr;
  check_place(op, name, scale, like);
  check_shape(op, name, scale, {size});
  STD_TORCH_CHECK(scale.scalar_type() == ScalarType::Float && scale.is_contiguous(), op, ": ", name,
                  " must be contiguous float32");
  return static_cast<const float*>(scale.const_data_ptr());
}

void kron_mix_(std::vector<Tensor> out, std::vector<Tensor> X, std::vector<Tensor> w, std::vector<Tensor> scale) {
  constexpr const char* op = "kron_mix_";
  STD_TORCH_CHECK(w.size() == X.size() && scale.size() == 2 * X.size(), op, ": ", X.size(),
                  " stacks need as many w, got ", w.size(), ", and twice as many scale, got ", scale.size());
  if (X.empty()) return;
  const Launcher launcher(op, X[0]);
  const auto launch = std::make_unique<MixLaunch>();  // 32 KB: not on the stack
  const auto start = [&] {
    if (launch->blocks) launch_mix(*launch, launcher.stream());
    launcher.done();
    *launch = MixLaunch{};
  };
  size_t next = 0;
  for (size_t j = 0; j < X.size(); ++j) {
    check_place(op, "X", X[j], X[0]);
    STD_TORCH_CHECK(X[j].dim() == 3, op, ": X must be [L1, rows, columns], got ", X[j].dim(), " dimensions");
    MixJob job{};
    job.x = X[j].const_data_ptr();
    job.layers_in = X[j].size(0);
    job.layers_out = job.layers_in;
    job.rows = X[j].size(1);
    job.columns = X[j].size(2);
    job.x_layer = X[j].stride(0);
    job.x_row = X[j].stride(1);
    job.x_column = X[j].stride(2);
    job.x_type = check_type(op, "X", X[j]);
    if (w[j].numel() || w[j].dim() == 2) {
      check_depth(op, w[j], w[j].size(0), job.layers_in, X[0]);
      // A sum over no layers has no w to point to; any address will do, as null stands for something else.
      job.w = job.layers_in ? static_cast<const float*>(w[j].const_data_ptr()) : reinterpret_cast<const float*>(16);
      job.w_row = w[j].stride(0);
      job.layers_out = w[j].size(0);
    }
    job.row_scale = vector_of("row scale", scale[2 * j], job.rows, X[0]);
    job.column_scale = vector_of("column scale", scale[2 * j + 1], job.columns, X[0]);
    STD_TORCH_CHECK(job.layers_out <= kMaxTargets, op, ": at most ", kMaxTargets, " targets a stack, got ",
                    job.layers_out);
    std::vector<void*> targets(job.layers_out);
    if (next < out.size() && out[next].dim() == 3) {
      const Tensor& whole = out[next++];
      check_place(op, "out", whole, X[0]);
      check_shape(op, "out", whole, {job.layers_out, job.rows, job.columns});
      job.y_type = check_type(op, "out", whole);
      job.y_row = whole.stride(1);
      job.y_column = whole.stride(2);
      for (int32_t l = 0; l < job.layers_out; ++l) {
        targets[l] = static_cast<char*>(whole.mutable_data_ptr()) + l * whole.stride(0) * type_size(job.y_type);
      }
    } else {
      STD_TORCH_CHECK(next + job.layers_out <= out.size(), op, ": stack ", j, " needs ", job.layers_out, " targets, ",
                      out.size() - next, " are left");
      for (int32_t l = 0; l < job.layers_out; ++l) {
        const Tensor& target = out[next++];
        check_place(op, "out", target, X[0]);
        check_shape(op, "out", target, {job.rows, job.columns});
        const Type type = check_type(op, "out", target);
        if (l == 0) {
          job.y_row = target.stride(0);
          job.y_column = target.stride(1);
          job.y_type = type;
        }
        STD_TORCH_CHECK(target.stride(0) == job.y_row && target.stride(1) == job.y_column && type == job.y_type, op,
                        ": targets of one stack must have the same strides and dtype");
        targets[l] = target.mutable_data_ptr();
      }
    }
    simplify(job);
    job.path = mix_path(job, targets.data());
    if (!add_job(*launch, job, targets.data())) {
      start();
      STD_TORCH_CHECK(add_job(*launch, job, targets.data()), op, ": stack ", j, " is too large for one launch");
    }
  }
  STD_TORCH_CHECK(next == out.size(), op, ": ", out.size(), " targets, expected ", next);
  start();
}

void check_stack(const char* name, const Tensor& tensor, int64_t layers, const Tensor& G) {
  constexpr const char* op = "kron_mix_backward_";
  check_place(op, name, tensor, G);
  check_shape(op, name, tensor, {layers, G.size(1), G.size(2)});
  STD_TORCH_CHECK(tensor.is_contiguous(), op, ": ", name, " must be contiguous");
  STD_TORCH_CHECK(tensor.scalar_type() == G.scalar_type(), op, ": ", name, " must have the dtype of G");
}

void kron_mix_backward_(std::optional<Tensor> mixed, std::optional<Tensor> dw, Tensor G, Tensor U, Tensor w) {
  constexpr const char* op = "kron_mix_backward_";
  STD_TORCH_CHECK(G.dim() == 3, op, ": G must be [L2, rows, columns], got ", G.dim(), " dimensions");
  const int64_t layers_out = G.size(0), layers_in = w.dim() == 2 ? w.size(1) : 0;
  MixBackward task{};
  task.type = check_type(op, "G", G);
  check_depth(op, w, layers_out, layers_in, G);
  STD_TORCH_CHECK(layers_in <= kMixMaxLayersBackward && layers_out <= kMixMaxLayersBackward, op, ": at most ",
                  kMixMaxLayersBackward, " layers, got ", layers_in, " and ", layers_out);
  check_stack("G", G, layers_out, G);
  check_stack("U", U, layers_in, G);
  if (mixed) check_stack("mixed", *mixed, layers_in, G);
  if (dw) {
    check_place(op, "dw", *dw, G);
    check_shape(op, "dw", *dw, {layers_out, layers_in});
    STD_TORCH_CHECK(dw->scalar_type() == ScalarType::Float && dw->is_contiguous(), op,
                    ": dw must be contiguous float32");
  }
  task.layers_in = layers_in;
  task.layers_out = layers_out;
  task.elements = G.size(1) * G.size(2);
  if (w.numel() == 0 || task.elements == 0 || (!mixed && !dw)) {  // sums over nothing
    if (mixed && mixed->numel()) torch::stable::zero_(*mixed);
    if (dw && dw->numel()) torch::stable::zero_(*dw);
    return;
  }
  const Launcher launcher(op, G);
  task.G = G.const_data_ptr();
  task.U = U.const_data_ptr();
  task.w = static_cast<const float*>(w.const_data_ptr());
  task.w_row = w.stride(0);
  if (mixed) task.mixed = mixed->mutable_data_ptr();
  std::optional<Tensor> workspace;
  if (dw) {
    const std::array<int64_t, 1> size{
        mix_backward_plan(layers_in, layers_out, task.elements, type_size(task.type)).workspace};
    workspace = torch::stable::new_empty(G, size, ScalarType::Float);
    task.dw = static_cast<float*>(dw->mutable_data_ptr());
    task.partials = static_cast<float*>(workspace->mutable_data_ptr());
  }
  launch_mix_backward(task, launcher.stream());
  launcher.done();
}

const int64_t* index_of(const char* name, const std::optional<Tensor>& index, int64_t from, int64_t to,
                        const Tensor& like) {
  constexpr const char* op = "kron_gather_";
  if (!index) {
    STD_TORCH_CHECK(from == to, op, ": out has ", to, " ", name, ", expected ", from, " as X where there is no index");
    return nullptr;
  }
  check_place(op, name, *index, like);
  check_shape(op, name, *index, {to});
  STD_TORCH_CHECK(index->scalar_type() == ScalarType::Long && index->is_contiguous(), op, ": ", name,
                  " must be contiguous int64");
  return static_cast<const int64_t*>(index->const_data_ptr());
}

void kron_gather_(Tensor out, Tensor X, std::optional<Tensor> layers, std::optional<Tensor> rows,
                  std::optional<Tensor> columns) {
  constexpr const char* op = "kron_gather_";
  STD_TORCH_CHECK(X.dim() == 3 && out.dim() == 3, op, ": X and out must have 3 dimensions, got ", X.dim(), " and ",
                  out.dim());
  check_place(op, "out", out, X);
  STD_TORCH_CHECK(X.scalar_type() == out.scalar_type(), op, ": out must have the dtype of X");
  const int64_t element = X.element_size();
  STD_TORCH_CHECK(element <= 8, op, ": elements of ", element, " bytes are not supported");
  Gather gather{};
  gather.x = X.const_data_ptr();
  gather.y = out.mutable_data_ptr();
  gather.layers = index_of("layers", layers, X.size(0), out.size(0), X);
  gather.rows = index_of("rows", rows, X.size(1), out.size(1), X);
  gather.columns = index_of("columns", columns, X.size(2), out.size(2), X);
  if (out.numel() == 0) return;
  STD_TORCH_CHECK(X.numel(), op, ": X is empty, there is nothing to copy");
  const auto in_lines = [&](const Tensor& t) {  // whole 16-byte units along every row
    return t.stride(2) == 1 && t.stride(0) * element % 16 == 0 && t.stride(1) * element % 16 == 0 &&
           aligned(t.const_data_ptr(), 16);
  };
  const bool whole = !columns && in_lines(X) && in_lines(out);
  const GatherPlan plan = gather_plan(out.size(0), out.size(1), out.size(2), element, whole);
  STD_TORCH_CHECK(plan.blocks <= kMaxBlocks, op, ": out is too large for one launch");
  const int64_t per_unit = plan.unit / element;
  gather.x_layers = X.size(0);
  gather.x_rows = X.size(1);
  gather.x_columns = X.size(2);
  gather.layer_count = out.size(0);
  gather.row_count = out.size(1);
  gather.column_count = out.size(2) / per_unit;
  gather.x_layer = X.stride(0) / per_unit;
  gather.x_row = X.stride(1) / per_unit;
  gather.x_column = X.stride(2);
  gather.y_layer = out.stride(0) / per_unit;
  gather.y_row = out.stride(1) / per_unit;
  gather.y_column = out.stride(2);
  const Launcher launcher(op, X);
  launch_gather(gather, plan, launcher.stream());
  launcher.done();
}

#define GROWKIT_TEXT(x) #x
#define GROWKIT_STRING(...) GROWKIT_TEXT((__VA_ARGS__))

}  // namespace

BuildFacts build_facts() {
  return {GROWKIT_STRING(__CUDA_ARCH_LIST__), __CUDACC_VER_MAJOR__, __CUDACC_VER_MINOR__, TORCH_TARGET_VERSION,
          aoti_torch_get_current_cuda_stream != nullptr};
}

STABLE_TORCH_LIBRARY_IMPL(growkit, CUDA, m) {
  m.impl("kron_mix_", TORCH_BOX(&kron_mix_));
  m.impl("kron_mix_backward_", TORCH_BOX(&kron_mix_backward_));
  m.impl("kron_gather_", TORCH_BOX(&kron_gather_));
}

}  // namespace growkit
