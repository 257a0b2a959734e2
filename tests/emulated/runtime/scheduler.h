// Decides which thread runs next. A World's inside.
#pragma once

#include <chrono>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "block.h"
#include "emulator.h"

namespace dpcomm::emulated {

class Scheduler {
 public:
  explicit Scheduler(const WorldOptions& given);
  ~Scheduler();
  Scheduler(const Scheduler&) = delete;
  Scheduler& operator=(const Scheduler&) = delete;

  // For World (emulator.h).
  void launch(Launch launch);
  bool advance();
  void acquire(int stream);
  void acquire_all();
  std::string report() const;
  uint64_t turns() const { return turns_; }
  const RankCounts& counts(int rank) { return counts_[rank]; }

  // For threads that run (device.cc).
  const WorldOptions& options() const { return options_; }
  Random& random() { return random_; }
  /// Progress: stores that others wait for, barriers that opened, threads that ended.
  uint64_t events() const { return events_; }
  void note_event() { ++events_; }
  /// Leaves the thread; returns when it has its next turn.
  void leave(Fiber& fiber);
  /// Leaves the thread until `count` threads from `first` on have come to the barrier.
  void meet(Fiber& fiber, Barrier& barrier, State state, uint32_t first, uint32_t count,
            bool orders_memory);

 private:
  void start_blocks();
  void start(Grid* grid, uint32_t index);
  static void enter();
  void end(Block* block);
  void drop(Block* block);

  void draw_mood(Block& block);
  void turn(Block& block);
  bool polls_in_vain(const Fiber& fiber);
  void run(Fiber& fiber);
  void watch(bool moved);
  void check_time() const;
  std::string state_of(const Fiber& fiber) const;
  std::string report(const Block& block) const;
  std::string report(int stream, const Grid& grid) const;

  WorldOptions options_;
  Random random_;
  std::map<int, Stream> streams_;
  std::map<int, uint64_t> launches_;
  std::map<int, int> residents_;  // blocks, by device
  std::map<int, RankCounts> counts_;
  std::vector<Block*> live_;
  std::vector<Grid*> ended_grids_;
  uint64_t events_ = 0, turns_ = 0, sweeps_ = 0, idle_sweeps_ = 0;
  std::string error_;
  Context main_context_;
  void* main_tsan_ = nullptr;
  std::chrono::steady_clock::time_point begin_;
};

/// The scheduler whose thread runs at this moment.
extern constinit thread_local Scheduler* running_scheduler;

/// printf for numbers, which are all given as 64 bits: %llu, %#llx.
std::string text_of(const char* format, uint64_t a, uint64_t b = 0, uint64_t c = 0);

}  // namespace dpcomm::emulated
