// What the driver is asked to run, and how it reads that: a line of key=value words for the case,
// one for each operation, each followed by the raw input bytes of all ranks.
#pragma once

#include <cstdint>
#include <iosfwd>
#include <map>
#include <string>
#include <vector>

#include "transport/channel.h"

namespace dpcomm::emulated {

/// One operation, of which every rank has its part.
struct Operation {
  OpRecord record;
  int ctas = 1;
  bool in_place = false;
  size_t input_offset = 0;  ///< bytes behind a multiple of 256
  size_t output_offset = 0;
  std::vector<std::string> inputs;  ///< bytes, by rank; empty where a rank has none

  size_t input_bytes(int world) const;
  /// 0 where the rank has no output.
  size_t output_bytes(int world, int rank) const;
  bool has_input(int rank) const;
};

struct Case {
  int world = 2;
  int ctas = 1;
  int threads = 64;
  int slots = 2;
  int plan_slots = 0;  ///< what the plan takes for the number of slots, where it is not the truth
  size_t slot_bytes = 4096;
  size_t packets = 0;         ///< capacity
  bool virtual_ranks = true;  ///< one launch for all ranks; else a device and a stream each
  uint64_t seed = 1;
  int resident = 0;
  uint64_t patience = 4096;
  double limit_s = 0;
  uint32_t look_every = 4;
  uint32_t record_after = 16;
  bool count = false;
  uint64_t first_message = 0;  ///< messages that all channels count as gone before
  int64_t abort_at = -1;       ///< sweeps of the scheduler after which rank `abort_rank` is aborted
  int abort_rank = 0;
  int64_t abort_all_at = -1;  ///< ... and all
  int other_tag_rank = -1;    ///< a rank that runs another operation
  std::vector<Operation> operations;
};

/// False at the end of the input. Throws on what it does not understand.
bool read_case(std::istream& in, Case& to);

}  // namespace dpcomm::emulated
