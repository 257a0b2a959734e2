// Memory that the processes of a host share, for NumPy and whoever takes a buffer.
#include <pybind11/pybind11.h>

#include <memory>
#include <utility>

#include "bind/core_bindings.h"
#include "cpu/shared_heap.h"

namespace py = pybind11;

namespace dpcomm {
namespace {

/// A block of the heap with the buffer protocol; freed with the last view.
class SharedBlock {
 public:
  explicit SharedBlock(size_t bytes) : data_(SharedHeap::allocate(bytes)), bytes_(bytes) {}
  ~SharedBlock() { SharedHeap::free(data_); }
  SharedBlock(const SharedBlock&) = delete;
  SharedBlock& operator=(const SharedBlock&) = delete;

  py::buffer_info buffer() const {
    return py::buffer_info(static_cast<uint8_t*>(data_), static_cast<py::ssize_t>(bytes_));
  }

 private:
  void* data_;
  size_t bytes_;
};

py::object shared_block(size_t bytes) {
  std::unique_ptr<SharedBlock> block;
  {
    const py::gil_scoped_release release;
    block = std::make_unique<SharedBlock>(bytes);
  }
  PyObject* view = PyMemoryView_FromObject(py::cast(std::move(block)).ptr());
  if (view == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(view);
}

}  // namespace

void bind_shared_memory(py::module_& module) {
  py::class_<SharedBlock>(module, "_SharedBlock", py::buffer_protocol())
      .def_buffer(&SharedBlock::buffer);
  module.def("shared_block", &shared_block, py::arg("bytes"),
             "Zeroed bytes in this process's shared memory, freed with the last view.");
  module.def(
      "is_shared",
      [](uintptr_t address, size_t bytes) {
        return SharedHeap::offset_of(reinterpret_cast<void*>(address), bytes).has_value();
      },
      py::arg("address"), py::arg("bytes"));
  module.def("shared_bytes", &SharedHeap::allocated_bytes);
  module.def(
      "_heap_registry", [] { return reinterpret_cast<uintptr_t>(SharedHeap::registry()); },
      "Where dpcomm._torch, which has a copy of this library, finds the heap.");
}

}  // namespace dpcomm
