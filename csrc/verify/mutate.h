// Faults to plant in a plan, to show that the prover sees them.
#pragma once

#include <cstdint>

#include "verify/plan.h"

namespace dpcomm {

enum class Mutation : uint8_t {
  kDropReduce,  ///< a reduction leaves out the own input
  kDropStep,    ///< a step is missing
  kWrongChunk,  ///< a step names another chunk (or slice)
  kDropCopy,    ///< a result is not kept
  kSwapSteps,   ///< two steps on one channel change places
  kWrongPeer,   ///< a step sends to, or receives from, somebody else or fewer
  kNotAsSent,   ///< the own contribution is added unrounded where others get it rounded
  kRepeatStep,  ///< a step is there twice
  kWriteFirst,  ///< a slice is written before its input is read
  kOneLane,     ///< all lanes use the channels of the first, on all ranks
  kMutations,
};

constexpr const char* name(Mutation mutation) {
  constexpr const char* kNames[] = {"drop_reduce", "drop_step",  "wrong_chunk", "drop_copy",
                                    "swap_steps",  "wrong_peer", "not_as_sent", "repeat_step",
                                    "write_first", "one_lane"};
  return kNames[static_cast<int>(mutation)];
}

inline constexpr int kMutations = static_cast<int>(Mutation::kMutations);

/// Plants one fault of the kind at a place drawn by `seed`, in any operation. False if the plan has
/// no place for it.
bool mutate(Plan& plan, Mutation mutation, uint64_t seed);

}  // namespace dpcomm
