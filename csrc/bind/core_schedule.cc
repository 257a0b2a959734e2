#include "bind/core_bindings.h"

namespace dpcomm {

void bind_schedule(pybind11::module_&) {}

}  // namespace dpcomm
