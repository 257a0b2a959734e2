#include "bind/core_bindings.h"

namespace dpcomm {

void bind_wire(pybind11::module_&) {}

}  // namespace dpcomm
