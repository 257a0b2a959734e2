// Counts of a communicator as a dict of Python, the same from both extension modules.
#pragma once

#include <pybind11/pybind11.h>

#include "comm/communicator.h"

namespace dpcomm {

inline pybind11::dict stats_dict(const CommunicatorStats& stats) {
  pybind11::dict collectives;
  for (int i = 0; i < kCollectives; ++i) {
    const CollectiveStats& each = stats.collectives[i];
    if (each.operations == 0) continue;
    pybind11::dict counts;
    counts["operations"] = each.operations;
    counts["bytes"] = each.bytes;
    counts["wire_bytes"] = each.wire_bytes;
    counts["busy_ns"] = each.busy_ns;
    collectives[name(static_cast<Collective>(i))] = counts;
  }
  pybind11::dict all;
  all["operations"] = stats.operations;
  all["messages"] = stats.messages;
  all["bytes"] = stats.bytes;
  all["wire_bytes"] = stats.wire_bytes;
  all["wait_ns"] = stats.wait_ns;
  all["exposed_wait_ns"] = stats.exposed_wait_ns;
  all["collectives"] = collectives;
  return all;
}

}  // namespace dpcomm
