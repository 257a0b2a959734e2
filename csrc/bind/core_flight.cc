// Flight recorder and counts for Python.
#include <pybind11/stl.h>

#include <chrono>

#include "base/clock.h"
#include "bind/core_bindings.h"
#include "comm/flight_recorder.h"
#include "schedule/registry.h"

namespace py = pybind11;

namespace dpcomm {
namespace {

int64_t wall_offset_ns() {
  const auto wall = std::chrono::system_clock::now().time_since_epoch();
  return std::chrono::duration_cast<std::chrono::nanoseconds>(wall).count() - now_ns();
}

py::object time(int64_t ns, int64_t offset) {
  if (ns == 0) return py::none();
  return py::int_(ns + offset);
}

py::dict as_dict(const FlightEntry& entry, const FlightGroup& group, int rank, int64_t offset) {
  const bool collective = entry.kind == FlightKind::kCollective;
  py::dict all;
  all["rank"] = rank;
  all["id"] = entry.id;
  all["group"] = group.name;
  all["group_ranks"] = group.global_ranks;
  all["name"] = name(entry);
  all["sequence"] = entry.sequence;
  all["state"] = name(entry.state);
  all["error"] = entry.error.empty() ? py::object(py::none()) : py::object(py::str(entry.error));
  all["dtype"] = name(entry.dtype);
  all["input_elems"] = entry.input_elems;
  all["output_elems"] = entry.output_elems;
  all["op"] = collective && reduces(entry.collective) ? py::object(py::str(name(entry.op)))
                                                      : py::object(py::none());
  all["algorithm"] =
      collective ? py::object(py::str(kAlgorithms[entry.algorithm].name)) : py::object(py::none());
  all["wire"] = name(entry.wire);
  all["peer"] = entry.peer;
  all["tag"] = entry.tag;
  all["async_op"] = entry.async;
  all["on_device"] = entry.on_device;
  all["timeout_ms"] = entry.timeout_ms;
  all["created_ns"] = time(entry.created_ns, offset);
  all["started_ns"] = time(entry.started_ns, offset);
  all["completed_ns"] = time(entry.completed_ns, offset);
  return all;
}

py::list flight_record() {
  const int64_t offset = wall_offset_ns();
  py::list list;
  for (const auto& recorder : FlightRecorder::all()) {
    const std::vector<FlightEntry> entries = recorder->entries();
    const std::vector<FlightGroup> groups = recorder->groups();
    for (const FlightEntry& entry : entries) {
      list.append(as_dict(entry, groups[entry.group], recorder->global_rank(), offset));
    }
  }
  return list;
}

std::vector<std::string> dump_flight_record(const std::string& prefix) {
  std::vector<std::string> files;
  for (const auto& recorder : FlightRecorder::all()) files.push_back(recorder->dump(prefix));
  return files;
}

}  // namespace

void bind_flight(py::module_& module) {
  module.def("flight_record", &flight_record, "The last operations of this process.");
  module.def("dump_flight_record", &dump_flight_record, py::arg("prefix"));
  module.def(
      "_flight_registry", [] { return reinterpret_cast<uintptr_t>(FlightRecorder::registry()); },
      "Where dpcomm._torch, which has a copy of this library, finds the recorders.");
}

}  // namespace dpcomm
