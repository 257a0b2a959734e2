// dpcomm._core.VirtualGroup: all ranks of a group in one process, on one CUDA device.
#include <pybind11/stl.h>

#include "base/names.h"
#include "bind/core_bindings.h"
#include "cuda/engine.h"
#include "cuda/launch_plan.h"
#include "schedule/registry.h"

namespace py = pybind11;

namespace dpcomm {
namespace {

/// The C++ group, and the number of its operations.
class BoundGroup {
 public:
  BoundGroup(int world, int device, int max_ctas, size_t staging_bytes) {
    DeviceSetup setup;
    setup.world = world;
    setup.device = device;
    setup.staging_bytes = staging_bytes;
    const py::gil_scoped_release release;
    setup.max_ctas = resident_ctas(device, world, max_ctas);
    group_ = make_virtual_group(setup);
  }

  /// ctas, slots, slot_bytes, packet_capacity
  std::tuple<int, int, size_t, size_t> geometry() const {
    const StagingGeometry& geometry = group_->geometry();
    return {geometry.ctas, geometry.slots, geometry.slot_bytes, geometry.packet_capacity};
  }
  size_t staging_bytes() const { return group_->staging_bytes(); }
  int ctas_of(size_t bytes) const { return choose_ctas(bytes, group_->geometry().ctas); }

  void launch(const std::string& collective, const std::string& algorithm, const std::string& dtype,
              const std::string& op, const std::string& wire, size_t count, int root, double factor,
              const std::vector<uintptr_t>& inputs, const std::vector<uintptr_t>& outputs,
              uintptr_t stream) {
    OpRecord record;
    record.sequence = ++sequence_;
    record.count = count;
    record.factor = factor;
    record.root = root;
    const auto kind = by_name<Collective>(collective, kCollectives, "collective");
    record.collective = static_cast<uint8_t>(kind);
    record.dtype = static_cast<uint8_t>(by_name<Dtype>(dtype, kDtypes, "dtype"));
    record.op = static_cast<uint8_t>(by_name<ReduceOp>(op, kReduceOps, "op"));
    record.wire = static_cast<uint8_t>(by_name<WireFormat>(wire, kWireFormats, "wire"));
    const int index = find_algorithm(kind, algorithm);
    if (index < 0) throw usage_error("there is no algorithm ", algorithm, " for ", collective);
    record.algorithm = static_cast<uint8_t>(index);
    std::vector<const void*> from;
    std::vector<void*> to;
    for (const uintptr_t address : inputs) from.push_back(reinterpret_cast<const void*>(address));
    for (const uintptr_t address : outputs) to.push_back(reinterpret_cast<void*>(address));
    const py::gil_scoped_release release;
    group_->launch(record, 1, from, to, reinterpret_cast<void*>(stream));
  }

  void abort() { group_->abort(); }

  /// (rank, peer, cta, lane, step, kind, seen, wanted) of each wait that lasts.
  std::vector<std::tuple<int, int, int, int, int, int, uint32_t, uint32_t>> waits() const {
    std::vector<std::tuple<int, int, int, int, int, int, uint32_t, uint32_t>> list;
    for (const WaitRecord& wait : group_->waits()) {
      list.emplace_back(wait.rank, wait.peer, wait.cta, wait.lane, wait.step, wait.state, wait.seen,
                        wait.wanted);
    }
    return list;
  }

 private:
  std::unique_ptr<VirtualGroup> group_;
  uint64_t sequence_ = 0;
};

}  // namespace

void bind_virtual_group(py::module_& module) {
  py::class_<BoundGroup>(module, "VirtualGroup")
      .def(py::init<int, int, int, size_t>(), py::arg("world"), py::arg("device"),
           py::arg("max_ctas"), py::arg("staging_bytes"))
      .def_property_readonly("geometry", &BoundGroup::geometry)
      .def_property_readonly("staging_bytes", &BoundGroup::staging_bytes)
      .def("ctas_of", &BoundGroup::ctas_of, py::arg("bytes"))
      .def("launch", &BoundGroup::launch, py::arg("collective"), py::arg("algorithm"),
           py::arg("dtype"), py::arg("op"), py::arg("wire"), py::arg("count"), py::arg("root"),
           py::arg("factor"), py::arg("inputs"), py::arg("outputs"), py::arg("stream"))
      .def("abort", &BoundGroup::abort)
      .def("waits", &BoundGroup::waits);
}

}  // namespace dpcomm
