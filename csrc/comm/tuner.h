// Which algorithm and wire format an operation takes.
#pragma once

#include "comm/communicator.h"
#include "cpu/local_paths.h"
#include "cuda/layout.h"

namespace dpcomm {

struct Choice {
  int algorithm = 0;  ///< index into kAlgorithms
  WireFormat wire = WireFormat::kNative;
  Path path = Path::kChannels;  ///< of an operation on the CPU
};

/// A function of its arguments alone, the same on every rank (law 11). Never a lossier wire than
/// the user allowed; a lossy one only where law 8 admits it and the link gains by it. Throws
/// UsageError for an algorithm that does not exist or cannot carry the wire format that was asked
/// for.
/// `device`: of the staging, for an operation on a device, where the links are those between
/// devices; null for one on the CPU. `host`: what paths there are on the CPU.
Choice choose(const Operation& operation, const CommunicatorOptions& options, const HostFacts& host,
              const StagingGeometry* device = nullptr);

/// Throws UsageError unless `algorithm` is "auto" or the name of an algorithm of any collective.
void check_algorithm(const std::string& algorithm);

}  // namespace dpcomm
