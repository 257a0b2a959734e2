// CUDA devices, as far as they concern nobody's communicator.
#include <pybind11/stl.h>

#include "bind/core_bindings.h"
#include "cuda/engine.h"

namespace py = pybind11;

namespace dpcomm {

void bind_device(py::module_& module) {
  module.def(
      "device_count",
      [] {
        std::string why;
        const int count = [&] {
          const py::gil_scoped_release release;
          return device_count(&why);
        }();
        return std::make_pair(count, why);
      },
      "CUDA devices, and why there are none (empty where there are).");
}

}  // namespace dpcomm
