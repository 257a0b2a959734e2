// The ranks of one case: their memory, and the launches of their operations, as the host's engine
// makes them.
#pragma once

#include <deque>
#include <string>
#include <vector>

#include "arena.h"
#include "case.h"
#include "cuda/kernel_args.h"
#include "cuda/layout.h"
#include "emulator.h"

namespace dpcomm::emulated {

class Ranks {
 public:
  explicit Ranks(const Case& the_case);

  /// Queues all operations on their streams.
  void launch(World& world);
  void abort(int rank) { __atomic_store_n(abort_words_[rank], 1, __ATOMIC_RELAXED); }
  MemoryMap& map() { return arena_.map(); }

  /// Throws Fault where a guard zone or an input was written to.
  void check() const;
  /// The outputs of all operations, by operation, then by rank.
  std::string outputs() const;
  /// The records of waits, one in a line.
  std::string waits() const;

 private:
  struct Tensors {
    std::vector<char*> inputs, outputs;  // by rank
  };

  void make_staging();
  void make_states();
  ChannelCounts pretend_messages(const ChannelEnds& ends) const;
  void make_tensors(const Operation& operation, int number);
  Launch make_launch(const Operation& operation, const Tensors& tensors, int first, int ranks);

  const Case& case_;
  Arena arena_;
  StagingLayout layout_;
  std::vector<char*> staging_;
  char** packets_ = nullptr;
  RankState* states_ = nullptr;
  std::vector<uint32_t*> abort_words_;
  std::vector<WaitRecord*> waits_;
  std::deque<Tensors> tensors_;
};

}  // namespace dpcomm::emulated
