// How a communicator gets its transport.
#pragma once

#include <chrono>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "transport/bootstrap.h"
#include "transport/channel.h"

namespace dpcomm {

struct TransportConfig {
  int rank = 0;
  int world = 1;
  int lanes = 1;          ///< lanes of channels of schedules; one more is for messages
  size_t slot_bytes = 0;  ///< of lane 0; 0: by world size
  int slots = 0;          ///< of every lane; 0: the default
  std::string name;       ///< unique per group and generation
  std::chrono::milliseconds timeout{600000};
  Bootstrap* bootstrap = nullptr;
};

/// Meets the other ranks; "auto" takes the best transport that reaches all of them. Throws
/// TimeoutError naming the ranks that did not come, UsageError for a name that is not in
/// transport/transports.def.
std::unique_ptr<Transport> make_transport(std::string_view name, const TransportConfig& config);

/// Every transport of transports.def, by name (for tests and info).
std::vector<std::string> transport_names();

#define DPCOMM_TRANSPORT(name, make) std::unique_ptr<Transport> make(const TransportConfig& config);
#include "transport/transports.def"
#undef DPCOMM_TRANSPORT

}  // namespace dpcomm
