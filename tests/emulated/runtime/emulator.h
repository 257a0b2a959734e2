// Runs grids of CUDA threads without a GPU: each thread is a fiber, all fibers of a World take
// turns on one OS thread, and the order of the turns follows from a seed. What the device code
// calls is in device.h.
//
// The order is adversarial: each block draws a speed now and then (some stand still for long), an
// order of its threads, and how often its threads are interrupted between two accesses. What may
// happen on a device only with weak memory is not shown by this, but by ThreadSanitizer (device.h).
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>

#include "device.h"
#include "memory.h"

namespace dpcomm::emulated {

/// Nothing moves any more, or the time is over. what() names every thread and what it waits for.
struct Stuck : std::runtime_error {
  using std::runtime_error::runtime_error;
};
/// A thread did what no thread may do: an access outside of all regions, a misaligned one,
/// publishing after it saw the abort word, ...
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct WorldOptions {
  uint64_t seed = 1;     ///< 0: in order, without interruptions
  int max_resident = 0;  ///< blocks of a device that run at the same time; 0: all
  /// Polls of a block without any progress anywhere after which it counts as stuck.
  uint64_t patience = 4096;
  /// Host threads or other processes write what is polled: never "stuck", only late.
  bool outside_writers = false;
  double limit_s = 0;  ///< after which the run is Stuck; 0: none
  bool check = true;   ///< accesses have to lie in regions of `memory` (ignored without a map)
  bool count = false;  ///< fill counts()
  MemoryMap* memory = nullptr;
};

/// One grid.
struct Launch {
  std::string name;
  uint32_t blocks_x = 1, blocks_y = 1;
  uint32_t threads = 32;       ///< of a block; a multiple of 32
  int device = 0;              ///< max_resident counts per device
  int stream = 0;              ///< launches of a stream run one after the other
  int first_rank = 0;          ///< rank of block_y = 0
  std::function<void()> body;  ///< run by every thread
  std::function<void()>
      ended;  ///< called outside of fibers when all blocks are through; may launch
};

/// All calls from one OS thread.
class World {
 public:
  explicit World(const WorldOptions& options);
  /// Drops what has not ended.
  ~World();
  World(const World&) = delete;
  World& operator=(const World&) = delete;

  /// Queues a grid on its stream. What this OS thread did before is before the grid.
  void launch(Launch launch);
  /// Gives all blocks one turn, more or less. False if nothing is left to run. Throws Stuck or
  /// Fault; afterwards nothing else can be done with the world.
  bool advance();
  /// advance() until nothing is left; then everything the grids did is before what follows.
  void run();
  /// For callers of advance(): what the ended grids of `stream` did is before what follows.
  void acquire(int stream);

  /// Turns of threads so far.
  uint64_t turns() const;
  /// The state of all threads, one line for each block.
  std::string report() const;
  const RankCounts& counts(int rank) const;

  struct Impl;

 private:
  std::unique_ptr<Impl> impl_;
};

}  // namespace dpcomm::emulated
