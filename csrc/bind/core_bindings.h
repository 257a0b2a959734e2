// The parts of dpcomm._core, one file each.
#pragma once

#include <pybind11/pybind11.h>

#include "base/error.h"

namespace dpcomm {

/// Sets the exception of dpcomm.errors that fits.
void set_python_error(const Error& error);  // core_errors.cc

void bind_errors(pybind11::module_& module);         // core_errors.cc
void bind_wire(pybind11::module_& module);           // core_wire.cc
void bind_schedule(pybind11::module_& module);       // core_schedule.cc
void bind_array(pybind11::module_& module);          // core_device_array.cc
void bind_device(pybind11::module_& module);         // core_device.cc
void bind_virtual_group(pybind11::module_& module);  // core_virtual_group.cc
void bind_communicator(pybind11::module_& module);   // core_communicator.cc
void bind_short_call(pybind11::module_& module);     // core_short_call.cc
void bind_flight(pybind11::module_& module);         // core_flight.cc
void bind_shared_memory(pybind11::module_& module);  // core_shared_memory.cc

}  // namespace dpcomm
