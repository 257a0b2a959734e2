// The choices made last, so that a loop of the same calls asks the tuner once.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "comm/tuner.h"

namespace dpcomm {

/// Of one communicator, whose options do not change. Not thread-safe.
class ChoiceCache {
 public:
  /// What choose() gives for an operation on the CPU, with its errors.
  Choice find(const Operation& operation, const CommunicatorOptions& options,
              const HostFacts& host) {
    if (!operation.algorithm.empty() || !operation.counts.empty()) {
      return choose(operation, options, host);
    }
    const uint64_t kind = kind_of(operation);
    Entry& entry = entries_[(operation.count ^ kind ^ (kind >> 8)) % kEntries];
    if (entry.kind != kind || entry.count != operation.count || entry.root != operation.root) {
      const Choice choice = choose(operation, options, host);
      entry = Entry{operation.count, kind, operation.root, choice};
    }
    return entry.choice;
  }

 private:
  static constexpr size_t kEntries = 16;

  struct Entry {
    size_t count = 0;
    uint64_t kind = 0;  // 0: nothing yet
    int root = 0;
    Choice choice;
  };

  /// All that choose() looks at besides count and root; never 0.
  static uint64_t kind_of(const Operation& operation) {
    const uint64_t wire = operation.wire ? 1 + static_cast<uint64_t>(*operation.wire) : 0;
    return uint64_t{1} << 32 | wire << 24 | static_cast<uint64_t>(operation.op) << 16 |
           static_cast<uint64_t>(operation.dtype) << 8 |
           static_cast<uint64_t>(operation.collective);
  }

  std::array<Entry, kEntries> entries_;
};

}  // namespace dpcomm
