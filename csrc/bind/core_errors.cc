// C++ errors as the exceptions of dpcomm.errors.
#include "bind/core_bindings.h"

namespace dpcomm {
namespace {

namespace py = pybind11;

const char* class_name(ErrorKind kind) {
  switch (kind) {
    case ErrorKind::kUsage:
      return "UsageError";
    case ErrorKind::kPeer:
      return "PeerError";
    case ErrorKind::kTimeout:
      return "TimeoutError";
    case ErrorKind::kInternal:
      return "InternalError";
  }
  return "InternalError";
}

}  // namespace

void set_python_error(const Error& error) {
  const py::object type = py::module_::import("dpcomm.errors").attr(class_name(error.kind()));
  PyErr_SetString(type.ptr(), error.what());
}

void bind_errors(py::module_&) {
  py::register_local_exception_translator([](std::exception_ptr pointer) {
    if (!pointer) return;
    try {
      std::rethrow_exception(pointer);
    } catch (const Error& error) {
      set_python_error(error);
    }
  });
}

}  // namespace dpcomm
