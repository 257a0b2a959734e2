#include "bind/core_bindings.h"

namespace dpcomm {

void bind_communicator(pybind11::module_&) {}

}  // namespace dpcomm
