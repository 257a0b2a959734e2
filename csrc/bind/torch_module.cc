// The extension module dpcomm._torch: the backend for torch.distributed. Built with the pybind11
// that torch bundles, so that its types, and its translation of exceptions, are shared with torch.
#include <torch/csrc/Dtype.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <optional>
#include <string>
#include <torch/csrc/distributed/c10d/Types.hpp>
#include <utility>

#include "base/env.h"
#include "bind/stats_dict.h"
#include "comm/flight_recorder.h"
#include "cpu/shared_heap.h"
#include "schedule/registry.h"
#include "torch/process_group.h"
#include "torch/python_hooks.h"
#include "torch/shared_tensors.h"

namespace dpcomm {
namespace {

namespace py = pybind11;

/// The classes of dpcomm.errors by ErrorKind; held until the process ends.
PyObject* error_types[4];

const char* class_name(ErrorKind kind) {
  constexpr const char* kNames[] = {"UsageError", "PeerError", "TimeoutError", "InternalError"};
  return kNames[static_cast<int>(kind)];
}

/// An error of the core in the form that torch's own translation understands. pybind's functions
/// would do with a registered translator, but the engine of the backward pass uses torch's.
class PythonError final : public torch::PyTorchError {
 public:
  PythonError(ErrorKind kind, const char* message) : torch::PyTorchError(message), kind_(kind) {}
  PyObject* python_type() override { return error_types[static_cast<int>(kind_)]; }

 private:
  ErrorKind kind_;
};

/// What a signal handler of Python raised in this thread while it waited, for the next error.
thread_local std::exception_ptr raised_by_signal;

bool interrupted() {
  const py::gil_scoped_acquire gil;
  if (PyErr_CheckSignals() == 0) return false;
  raised_by_signal = std::make_exception_ptr(py::error_already_set());
  return true;
}

std::exception_ptr to_python_error(std::exception_ptr pointer) {
  if (raised_by_signal) return std::exchange(raised_by_signal, nullptr);
  try {
    std::rethrow_exception(pointer);
  } catch (const Error& error) {
    return std::make_exception_ptr(PythonError(error.kind(), error.what()));
  } catch (...) {
    return pointer;
  }
}

void without_gil(const std::function<void()>& body) {
  if (Py_IsInitialized() && PyGILState_Check()) {
    const py::gil_scoped_release release;
    body();
  } else {
    body();
  }
}

void install_hooks() {
  const py::module_ errors = py::module_::import("dpcomm.errors");
  for (const ErrorKind kind :
       {ErrorKind::kUsage, ErrorKind::kPeer, ErrorKind::kTimeout, ErrorKind::kInternal}) {
    error_types[static_cast<int>(kind)] = py::object(errors.attr(class_name(kind))).release().ptr();
  }
  python_hooks() = PythonHooks{&to_python_error, &interrupted, &without_gil};
  py::register_exception_translator([](std::exception_ptr pointer) {
    if (!pointer) return;
    try {
      std::rethrow_exception(pointer);
    } catch (PythonError& error) {
      PyErr_SetString(error.python_type(), error.what());
    } catch (const Error& error) {
      PyErr_SetString(error_types[static_cast<int>(error.kind())], error.what());
    }
  });
}

template <class Names>
std::string joined(const Names& names) {
  std::string all;
  for (const std::string& each : names) all += (all.empty() ? "" : ", ") + each;
  return all;
}

std::vector<std::string> wire_names() {
  std::vector<std::string> names;
  for (int i = 0; i < kWireFormats; ++i) names.emplace_back(name(static_cast<WireFormat>(i)));
  return names;
}

WireFormat wire_format(const std::string& wanted) {
  for (int i = 0; i < kWireFormats; ++i) {
    if (wanted == name(static_cast<WireFormat>(i))) return static_cast<WireFormat>(i);
  }
  throw usage_error("wire='", wanted, "' is none of ", joined(wire_names()));
}

std::vector<std::string> algorithm_names() {
  std::vector<std::string> names{"auto"};
  for (const AlgorithmInfo& info : kAlgorithms) {
    if (info.collective == Collective::kAllReduce) names.emplace_back(info.name);
  }
  return names;
}

std::string algorithm(const std::string& wanted) {
  const std::vector<std::string> names = algorithm_names();
  if (std::find(names.begin(), names.end(), wanted) != names.end()) return wanted;
  throw usage_error("algorithm='", wanted, "' is none of ", joined(names));
}

bool on_all_links(const std::string& wanted) {
  if (wanted == "all") return true;
  if (wanted == "network") return false;
  throw usage_error("wire_links='", wanted, "' is none of network, all");
}

/// `options` with what the user chose, a dpcomm.Options as its chosen() tells it.
void apply(CommunicatorOptions& options, const py::dict& chosen) {
  for (const auto& [key, value] : chosen) {
    const std::string name = key.cast<std::string>();
    if (name == "wire") {
      options.wire = wire_format(value.cast<std::string>());
    } else if (name == "wire_links") {
      options.wire_on_all_links = on_all_links(value.cast<std::string>());
    } else if (name == "algorithm") {
      options.algorithm = algorithm(value.cast<std::string>());
    } else if (name == "transport") {
      options.transport = value.cast<std::string>();
    } else if (name == "shared_buckets") {
      options.shared_buckets = value.cast<bool>();
    } else if (name == "timeout_ms") {
      options.timeout = std::chrono::milliseconds(value.cast<int64_t>());
    } else {
      throw usage_error("no option named ", name);
    }
  }
}

c10::intrusive_ptr<c10d::Backend> create(const c10d::DistributedBackendOptions& group,
                                         const py::dict& chosen) {
  // Lowest first: torch's timeout, the environment, what the call chose.
  CommunicatorOptions options = CommunicatorOptions::from_environment();
  if (environment(Variable::TIMEOUT).empty()) {
    options.timeout = std::chrono::duration_cast<std::chrono::milliseconds>(group.timeout);
  }
  apply(options, chosen);
  for (const int64_t rank : group.global_ranks_in_group) {
    options.global_ranks.push_back(static_cast<int>(rank));
  }
  const py::gil_scoped_release release;
  return c10::make_intrusive<ProcessGroupDpcomm>(group.store, group.group_rank, group.group_size,
                                                 group.group_id, std::move(options));
}

const Communicator& communicator_of(const c10::intrusive_ptr<c10d::Backend>& backend) {
  const auto* group = dynamic_cast<const ProcessGroupDpcomm*>(backend.get());
  if (group == nullptr) throw usage_error("not a group of backend dpcomm");
  return group->communicator();
}

py::dict stats(const c10::intrusive_ptr<c10d::Backend>& backend) {
  return stats_dict(communicator_of(backend).stats());
}

py::dict options(const c10::intrusive_ptr<c10d::Backend>& backend) {
  const CommunicatorOptions& options = communicator_of(backend).options();
  py::dict all;
  all["wire"] = name(options.wire);
  all["wire_links"] = options.wire_on_all_links ? "all" : "network";
  all["algorithm"] = options.algorithm;
  all["timeout_ms"] = options.timeout.count();
  all["transport"] = options.transport;
  all["shared_buckets"] = options.shared_buckets;
  all["name"] = options.name;
  return all;
}

/// The dpcomm.Options that a group has, with the time limit in force.
py::object options_of(ProcessGroupDpcomm& group) {
  const auto made = group.getBackendOptions();
  const CommunicatorOptions& options = static_cast<const GroupOptions&>(*made).communicator;
  py::dict chosen;
  chosen["wire"] = name(options.wire);
  chosen["wire_links"] = options.wire_on_all_links ? "all" : "network";
  chosen["algorithm"] = options.algorithm;
  chosen["shared_buckets"] = options.shared_buckets;
  chosen["timeout"] = static_cast<double>(options.timeout.count()) / 1000;
  if (options.transport != "inproc") chosen["transport"] = options.transport;
  return py::module_::import("dpcomm.options").attr("Options")(**chosen);
}

/// Makes torch's own options of a dpcomm.Options, wherever torch wants those.
PyObject* converted(PyObject* object, PyTypeObject* /*type*/) {
  try {
    const py::handle given(object);
    if (!py::isinstance(given, py::module_::import("dpcomm.options").attr("Options"))) {
      return nullptr;
    }
    const py::dict chosen = given.attr("chosen")();
    CommunicatorOptions options = CommunicatorOptions::from_environment();
    apply(options, chosen);
    auto made = c10::make_intrusive<GroupOptions>(std::move(options));
    made->timeout_chosen = chosen.contains("timeout_ms") || !environment(Variable::TIMEOUT).empty();
    return py::cast(std::move(made)).release().ptr();
  } catch (const py::error_already_set&) {  // torch says then what it wanted
    return nullptr;
  }
}

/// The classes that torch gets objects of. They add to those of torch what split_group and a user
/// ask for in Python.
void define_classes(py::module_& module) {
  py::class_<GroupOptions, c10d::Backend::Options, c10::intrusive_ptr<GroupOptions>>(
      module, "GroupOptions", "dpcomm.Options where torch wants options of its own kind.")
      .def("__copy__",
           [](const GroupOptions& self) { return c10::make_intrusive<GroupOptions>(self); })
      .def("__deepcopy__", [](const GroupOptions& self, const py::dict&) {
        return c10::make_intrusive<GroupOptions>(self);
      });
  auto* wanted = py::detail::get_type_info(typeid(c10d::Backend::Options));
  if (wanted != nullptr) wanted->implicit_conversions.push_back(&converted);
  py::class_<ProcessGroupDpcomm, c10d::Backend, c10::intrusive_ptr<ProcessGroupDpcomm>>(
      module, "ProcessGroupDpcomm", "A group of backend dpcomm.")
      .def_property_readonly("options", &options_of)
      .def("get_error", &ProcessGroupDpcomm::getError, py::call_guard<py::gil_scoped_release>())
      // torch calls it on ranks that have no part in a split; dpcomm needs nothing of them.
      .def("perform_nocolor_split", [](const ProcessGroupDpcomm&, const c10::Device&) {});
}

std::optional<std::string> set_thread_wire(const std::optional<std::string>& wire) {
  std::optional<std::string> previous;
  if (thread_wire()) previous = name(*thread_wire());
  thread_wire() = wire ? std::optional(wire_format(*wire)) : std::nullopt;
  return previous;
}

at::Tensor shared_empty_of(const std::vector<int64_t>& size, const py::object& dtype) {
  if (!THPDtype_Check(dtype.ptr())) {
    throw usage_error("dtype=", py::repr(dtype).cast<std::string>(), " is no torch.dtype");
  }
  const at::ScalarType type = reinterpret_cast<THPDtype*>(dtype.ptr())->scalar_type;
  const py::gil_scoped_release release;
  return shared_empty(size, type);
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.doc() = "dpcomm as a backend of torch.distributed.";
  py::module_::import("torch.distributed");  // the types that the functions below speak of
  install_hooks();
  const py::module_ core = py::module_::import("dpcomm._core");
  FlightRecorder::share(reinterpret_cast<void*>(core.attr("_flight_registry")().cast<uintptr_t>()));
  SharedHeap::share(reinterpret_cast<void*>(core.attr("_heap_registry")().cast<uintptr_t>()));
  define_classes(module);
  module.def("create", &create, py::arg("group"), py::arg("chosen"));
  module.def("shutdown_all", &ProcessGroupDpcomm::shutdown_all,
             py::call_guard<py::gil_scoped_release>());
  module.def("stats", &stats, py::arg("backend"));
  module.def("options", &options, py::arg("backend"));
  module.def("set_thread_wire", &set_thread_wire, py::arg("wire"));
  module.def("set_thread_shared_memory", &set_thread_shared_memory, py::arg("on"));
  module.def("shared_empty", &shared_empty_of, py::arg("size"), py::arg("dtype"));
  module.def("wires", &wire_names);
  module.def("algorithms", &algorithm_names);
}

}  // namespace dpcomm
