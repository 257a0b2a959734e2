// A plan: schedules written out step by step for all ranks, for proofs, pictures and the oracle.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "schedule/registry.h"

namespace dpcomm {

/// One operation of a plan. `slices` is per chunk, `rounds` passes of the schedule follow each
/// other.
struct PlannedOperation {
  int algorithm = 0;  ///< index into kAlgorithms
  int root = 0;
  int slices = 1;
  int rounds = 1;
  /// Rounds of each chunk, where blocks differ in size: what lies beyond is left out by all ranks.
  /// Empty: all have `rounds`.
  std::vector<int> block_rounds;

  bool has(int round, int chunk) const {
    return block_rounds.empty() || round < block_rounds[static_cast<size_t>(chunk)];
  }
};

/// A step and the round that it belongs to.
struct PlannedStep {
  Step step;
  int32_t round = 0;
};

/// All steps of one operation. Lanes of a rank are independent of each other; each is in order.
struct Phase {
  PlannedOperation operation;
  int lanes = 1;
  int chunks = 1;
  std::vector<std::vector<PlannedStep>> streams;  ///< [rank * lanes + lane]

  const AlgorithmInfo& info() const { return kAlgorithms[operation.algorithm]; }
  std::vector<PlannedStep>& stream(int rank, int lane) {
    return streams[static_cast<size_t>(rank) * lanes + lane];
  }
  const std::vector<PlannedStep>& stream(int rank, int lane) const {
    return streams[static_cast<size_t>(rank) * lanes + lane];
  }
};

/// Operations one after the other on the same channels. A rank begins an operation when all its
/// lanes have ended the one before; ranks do not wait for each other.
struct Plan {
  int world = 1;
  std::vector<Phase> phases;
};

/// The parameters that the generators of `rank` get.
ScheduleParams params_of(const PlannedOperation& operation, int rank, int world);

/// Writes out the operations. Throws UsageError for numbers that make no sense.
Plan make_plan(int world, const std::vector<PlannedOperation>& operations);

/// "RECV|REDUCE|SEND".
std::string primitive_name(uint8_t primitive);

}  // namespace dpcomm
