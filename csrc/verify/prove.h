// Proof of a plan by symbolic execution: what every rank ends with, for a given number of slots.
//
// Shown for a plan (one or several operations, any number of rounds, fixed numbers of ranks and
// slots):
//   - post-condition: every rank that has an output ends with every slice of it written once, by a
//     value with exactly the contributions that the collective asks for, each exactly once, divided
//     (AVG) exactly once;
//   - law 2: all ranks that keep a slice keep the same value, roundings on the wire included;
//   - no deadlock, no message left over;
//   - law 4: no channel is shared by two lanes, and both ends of a channel see the same order of
//     (operation, round, chunk, slice);
//   - blocks of unequal size: the same with any of the last rounds of a chunk left out by all
//   ranks;
//   - in place: no rank reads its input of a slice after it has written its output of that slice.
//
// One execution stands for all. Every step has a fixed list of channels to receive from and to send
// to, each channel has one lane that sends and one that receives, and no step chooses by what has
// come. So a step that can run stays able to run until it does, whatever others do (a marked graph,
// or a Kahn network with bounded buffers): the order of steps of different lanes changes neither
// the values nor whether all get to their end. Here a step runs at once or not at all; an executor
// that releases a slot earlier, sends to one peer before another, or has more slots, only lets more
// steps run. A lane that a rank waits for at the end of an operation is one more fixed condition.
//
// Reads and writes of the same slice by different lanes of a rank have no order of their own. The
// proof accepts them only where the order follows from the data: the write needs a value that
// contains the very contribution that the one read on the other lane gave.
//
// Cost: about 100 ns per message; memory (source, destination, lane) channels of 12 bytes, and one
// bit per rank and value in flight. Source: own; Kahn (1974), Commoner et al. (1971) for the
// argument.
#pragma once

#include <cstdint>
#include <string>

#include "verify/plan.h"

namespace dpcomm {

struct ProofOptions {
  int slots = 2;             ///< of every channel
  bool keep_as_sent = true;  ///< false plants a fault: owners keep the value before it is rounded
  bool check_form = true;    ///< false lets primitives pass that do not exist, to see that the
                             ///< execution itself refutes a plan
};

struct Proof {
  bool holds = false;
  std::string error;     ///< one sentence that names rank, lane, step and chunk; empty if it holds
  int64_t steps = 0;     ///< executed, over all ranks
  int64_t messages = 0;  ///< sent, over all ranks
  int roundings = 0;     ///< the most on the path of any contribution to any output
};

Proof prove(const Plan& plan, const ProofOptions& options);

}  // namespace dpcomm
