#include "lists.h"

#include <cstdint>
#include <stdexcept>
#include <vector>

namespace py = pybind11;

namespace growkit {

namespace {

// DLPack, version 1: https://dmlc.github.io/dlpack/latest/c_api.html and, for the exchange interface, dlpack.h of 1.3.
struct DLTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};

struct DLPackExchangeAPI {
  uint32_t major, minor;
  void *previous, *allocator, *from_object, *to_object;
  int (*describe)(void* object, DLTensor* out);  // non-zero: a Python error is set
  void* current_work_stream;
};

PyTypeObject* tensor_class = nullptr;
int (*describe_tensor)(void*, DLTensor*) = nullptr;

py::bytes bytes_of(const std::vector<int64_t>& words) {
  return {reinterpret_cast<const char*>(words.data()), words.size() * sizeof(int64_t)};
}

}  // namespace

void use_tensors(py::type cls) {
  const py::capsule capsule = cls.attr("__dlpack_c_exchange_api__");
  const auto* api = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (!api) throw py::error_already_set();
  if (api->major != 1 || !api->describe) throw std::runtime_error("use_tensors: expected DLPack 1 with DLTensors");
  describe_tensor = api->describe;
  tensor_class = reinterpret_cast<PyTypeObject*>(cls.release().ptr());
}

py::tuple describe(const py::list& tensors) {
  std::vector<int64_t> addresses, facts;
  addresses.reserve(tensors.size());
  facts.reserve(8 * tensors.size());
  for (const py::handle each : tensors) {
    if (!tensor_class || !PyObject_TypeCheck(each.ptr(), tensor_class)) {
      throw py::type_error("describe: expected tensors");
    }
    DLTensor t{};
    if (describe_tensor(each.ptr(), &t)) throw py::error_already_set();
    addresses.push_back(reinterpret_cast<intptr_t>(t.data) + static_cast<int64_t>(t.byte_offset));
    facts.push_back(t.ndim);
    facts.push_back(reinterpret_cast<intptr_t>(Py_TYPE(each.ptr())));
    facts.push_back(static_cast<int64_t>(t.device_type) << 32 | static_cast<uint32_t>(t.device_id));
    facts.push_back(t.code << 24 | t.bits << 16 | t.lanes);
    for (int d = 0; d < t.ndim; ++d) {
      facts.push_back(t.shape[d]);
      facts.push_back(t.strides[d]);
    }
  }
  return py::make_tuple(bytes_of(addresses), bytes_of(facts));
}

py::list referents(const py::list& references) {
  py::list found(references.size());
  Py_ssize_t i = 0;
  for (const py::handle each : references) {
    if (!PyWeakref_CheckRef(each.ptr())) throw py::type_error("referents: expected weak references");
    PyList_SET_ITEM(found.ptr(), i++, Py_NewRef(PyWeakref_GET_OBJECT(each.ptr())));
  }
  return found;
}

py::bytes identities(const py::object& owner) {
  std::vector<int64_t> objects;
  objects.reserve(9 * py::len(owner));
  const auto push = [&](PyObject* object) { objects.push_back(reinterpret_cast<intptr_t>(object)); };
  if (PyList_Check(owner.ptr())) {
    for (const py::handle each : py::reinterpret_borrow<py::list>(owner)) push(each.ptr());
    return bytes_of(objects);
  }
  PyObject *key, *value, *name, *entry;
  for (Py_ssize_t i = 0; PyDict_Next(owner.ptr(), &i, &key, &value);) {
    push(key);
    if (!PyDict_Check(value)) {
      push(value);
      continue;
    }
    objects.push_back(PyDict_Size(value));
    for (Py_ssize_t j = 0; PyDict_Next(value, &j, &name, &entry);) {
      push(name);
      push(entry);
    }
  }
  return bytes_of(objects);
}

}  // namespace growkit
