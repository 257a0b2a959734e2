// What the scheduler knows of threads, blocks and grids. Only the files of the emulator itself,
// which are compiled without ThreadSanitizer, may include this: what the scheduler does is not
// under test.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <deque>
#include <new>
#include <vector>

#include "context.h"
#include "device.h"
#include "emulator.h"
#include "memory.h"

namespace dpcomm::emulated {

inline constexpr int kSharedVariables = 16;
inline constexpr size_t kStackBytes = size_t{128} << 10;
inline constexpr size_t kSharedBytes = size_t{48}
                                       << 10;  // what a device grants without being asked

inline char* map_pages(size_t bytes) {
  void* pages = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (pages == MAP_FAILED) throw std::bad_alloc();
  return static_cast<char*>(pages);
}

/// For what code under ThreadSanitizer touches: to free() it would be an access that races.
template <class T>
struct PageAllocator {
  using value_type = T;
  T* allocate(size_t n) { return reinterpret_cast<T*>(map_pages(n * sizeof(T))); }
  void deallocate(T* place, size_t n) { munmap(place, n * sizeof(T)); }
  bool operator==(const PageAllocator&) const { return true; }
};

/// Splitmix64: small, and its bits are good from any seed.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t next() {
    uint64_t x = state_ += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
  }
  uint32_t below(uint32_t limit) { return static_cast<uint32_t>((next() >> 32) * limit >> 32); }
  bool one_in(uint32_t n) { return below(n) == 0; }

 private:
  uint64_t state_;
};

struct Block;
struct Grid;

enum class State : uint8_t { kReady, kPausing, kBlockBarrier, kWarpBarrier, kOver };

/// One CUDA thread. Lies in pages of its own (PageAllocator).
struct Fiber : Thread {
  Block* block = nullptr;
  Context context;
  char* stack = nullptr;
  void* tsan = nullptr;
  State state = State::kReady;
  bool saw_abort = false;  ///< or has met one that did
  const void* polled = nullptr;
  uint64_t seen = 0;
  uint64_t paused_at = 0;  ///< number of the last event before it paused
};

/// Threads that have come so far. Two places for ThreadSanitizer, taken in turn: a fast thread may
/// be at the next barrier before a slow one has left this one.
struct Barrier {
  uint32_t arrived = 0;
  uint32_t generation = 0;
  char places[2] = {};
  bool saw_abort[2] = {};
};

struct Warp {
  Barrier barrier;
  uint32_t given[2][32] = {};
};

struct SharedVariable {
  const void* key = nullptr;
  char* place = nullptr;
};

/// How a block behaves for a while.
struct Mood {
  uint32_t one_turn_in = 1;
  enum Order : uint8_t { kForward, kBackward, kShuffled, kFew } order = kForward;
  uint32_t budget = 0;    ///< accesses at most between two turns; 0: as many as it likes
  uint32_t yield_in = 0;  ///< at a flag, one time in so many; 0: never
};

/// A block that runs.
struct Block {
  Grid* grid = nullptr;
  std::vector<Fiber, PageAllocator<Fiber>> fibers;
  std::vector<uint32_t> ready, batch;  // never grow in a fiber: ThreadSanitizer sees memmove()
  std::vector<Warp, PageAllocator<Warp>> warps;
  Barrier barrier;
  uint32_t over = 0;
  uint64_t pauses = 0;
  uint64_t pauses_since = 0;  ///< number of the event that `pauses` counts from
  Mood mood;
  char* shared = nullptr;
  size_t shared_used = 0;
  SharedVariable variables[kSharedVariables] = {};
  RankCounts* counts = nullptr;
};

/// Grids that run one after the other.
struct Stream {
  std::deque<Grid*> queue;
  /// For ThreadSanitizer: grids of the stream, one after the other. They take turns with the two
  /// places: blocks of one grid that run one after the other are not ordered by that.
  char places[2] = {};
};

struct Grid {
  Launch launch;
  Stream* stream = nullptr;
  std::vector<uint32_t> waiting;  ///< indexes of the blocks that have not started
  uint32_t running = 0;
  uint64_t number = 0;  ///< of the launch on its stream, from 1
  char place = 0;       ///< for ThreadSanitizer: the host before the grid
};

}  // namespace dpcomm::emulated
