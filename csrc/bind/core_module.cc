// The torch-free extension module dpcomm._core: a table of contents.
#include "bind/core_bindings.h"

PYBIND11_MODULE(_core, module) {
  module.doc() = "dpcomm without torch: wire formats, schedules and communicators.";
  dpcomm::bind_errors(module);
  dpcomm::bind_wire(module);
  dpcomm::bind_schedule(module);
  dpcomm::bind_array(module);
  dpcomm::bind_device(module);
  dpcomm::bind_virtual_group(module);
  dpcomm::bind_communicator(module);
  dpcomm::bind_short_call(module);
  dpcomm::bind_flight(module);
  dpcomm::bind_shared_memory(module);
}
