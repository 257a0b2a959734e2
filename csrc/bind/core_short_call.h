// Methods of dpcomm.Communicator whose common calls go to the core without Python code between.
#pragma once

#include <pybind11/pybind11.h>

#include "bind/core_work.h"

namespace dpcomm {

/// What the object of the class dpcomm._core.Communicator holds; null for any other object. Good as
/// long as the object lives. (core_communicator.cc)
const std::shared_ptr<Shared>* shared_of(PyObject* core);

/// `function`, a method of the Python class Communicator that is named after a collective, with a
/// short way for calls that block, over arrays that see_plain_array() sees, with no other argument
/// than array, op, root and out. All other calls, and those with a mistake in their arguments, go
/// to `function`. Throws UsageError for a function of another name.
pybind11::object with_short_call(const pybind11::object& function);

}  // namespace dpcomm
