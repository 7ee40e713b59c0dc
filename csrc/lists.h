// What tensors and state are at this moment, as bytes that are compared with those of an earlier one.
#pragma once

#include <pybind11/pybind11.h>

namespace growkit {

// Take tensors of this class, torch.Tensor, whose type has the functions of DLPack's C exchange interface.
void use_tensors(pybind11::type cls);

// (addresses, facts) of a list of tensors: 8 bytes for each address; class, device, dtype, sizes and strides of each.
// Raises TypeError for what is no tensor, and what torch raises for a tensor without memory, such as a sparse one.
pybind11::tuple describe(const pybind11::list& tensors);

// Which objects a list holds, or are the keys and values of the dictionaries in a dictionary.
pybind11::bytes identities(const pybind11::object& owner);

// What a list of weak references refers to, None for what is gone.
pybind11::list referents(const pybind11::list& references);

}  // namespace growkit
