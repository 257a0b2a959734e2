#include "transport/transport.h"

#include "base/env.h"
#include "transport/faulty.h"

namespace dpcomm {

std::vector<std::string> transport_names() {
  return {
#define DPCOMM_TRANSPORT(name, make) name,
#include "transport/transports.def"
#undef DPCOMM_TRANSPORT
  };
}

std::unique_ptr<Transport> make_transport(std::string_view name, const TransportConfig& config) {
  if (name == "auto") name = "shm";
  std::unique_ptr<Transport> transport;
#define DPCOMM_TRANSPORT(known, make) \
  if (name == known) transport = make(config);
#include "transport/transports.def"
#undef DPCOMM_TRANSPORT
  if (transport == nullptr) {
    std::string known;
    for (const std::string& each : transport_names()) known += ", " + each;
    throw usage_error("transport '", name, "' is not known; there are auto", known);
  }
  const std::string faults = environment(Variable::FAULTS);
  return faults.empty() ? std::move(transport) : make_faulty(std::move(transport), faults);
}

}  // namespace dpcomm
