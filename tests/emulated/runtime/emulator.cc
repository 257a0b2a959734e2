#include "emulator.h"

#include <sched.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <deque>
#include <map>
#include <vector>

#include "context.h"
#include "tsan.h"

namespace dpcomm::emulated {

constinit thread_local Thread* self = nullptr;

namespace {

constexpr int kSharedVariables = 16;
constexpr size_t kStackBytes = size_t{128} << 10;
constexpr size_t kSharedBytes = size_t{48} << 10;  // what a device grants without being asked
constexpr uint64_t kIdleBeforeRest = 64;  // sweeps without progress, then others get the core
constexpr int32_t kForLong = INT32_MAX;

void* map_pages(size_t bytes) {
  void* pages = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (pages == MAP_FAILED) throw std::bad_alloc();
  return pages;
}

/// For what code under ThreadSanitizer touches: to free() it would be an access that races.
template <class T>
struct PageAllocator {
  using value_type = T;
  T* allocate(size_t n) { return static_cast<T*>(map_pages(n * sizeof(T))); }
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
  uint32_t exchanges = 0;
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

struct Block {
  Grid* grid = nullptr;
  std::vector<Fiber, PageAllocator<Fiber>> fibers;
  std::vector<uint32_t> ready, batch;  // never grow in a fiber: ThreadSanitizer sees memmove()
  std::vector<Warp, PageAllocator<Warp>> warps;
  Barrier barrier;
  uint32_t over = 0;
  uint64_t pauses = 0;
  uint64_t pauses_since = 0;  ///< number of the event that `pauses` counts from
  uint32_t saw_abort = 0;     ///< a bit for each warp
  Mood mood;
  char* shared = nullptr;
  size_t shared_used = 0;
  SharedVariable variables[kSharedVariables] = {};
  RankCounts* counts = nullptr;
};

struct Stream {
  std::deque<Grid*> queue;
  int number = 0;
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

std::string text_of(const char* format, uint64_t a, uint64_t b = 0, uint64_t c = 0) {
  char text[160];
  std::snprintf(text, sizeof text, format, static_cast<unsigned long long>(a),
                static_cast<unsigned long long>(b), static_cast<unsigned long long>(c));
  return text;
}

World::Impl* running_world(const Fiber& fiber);

// Pages that worlds on this OS thread have left, to be used again.
thread_local std::vector<char*> spare_stacks;
thread_local std::vector<char*> spare_shared;

char* new_pages(size_t bytes) { return static_cast<char*>(map_pages(bytes)); }
char* taken(std::vector<char*>& spare) {
  char* pages = spare.back();
  spare.pop_back();
  return pages;
}

}  // namespace

struct World::Impl {
  explicit Impl(const WorldOptions& given)
      : options(given), random(given.seed * 0x9e3779b97f4a7c15u + 1) {
    main_tsan = tsan::current();
    begin = std::chrono::steady_clock::now();
  }
  ~Impl() {
    for (Block* block : live) drop(block);
    for (auto& [number, stream] : streams) acquire(stream);
    for (Grid* grid : ended_grids) delete grid;
    // What threads that never ended have touched may not be freed in the eyes of ThreadSanitizer.
    for (auto& [number, stream] : streams) {
      for (Grid* grid : stream.queue) {
        if (!tsan::kOn) delete grid;
      }
    }
  }

  // --- starting and ending ---
  void launch(Launch launch) {
    if (launch.threads == 0 || launch.threads % 32 != 0 || launch.threads > 1024) {
      throw std::logic_error(text_of("blocks of %llu threads", launch.threads));
    }
    Stream& stream = streams[launch.stream];
    stream.number = launch.stream;
    Grid* grid = new Grid;
    grid->number = ++launches[launch.stream];
    grid->stream = &stream;
    grid->launch = std::move(launch);
    const uint32_t blocks = grid->launch.blocks_x * grid->launch.blocks_y;
    for (uint32_t i = blocks; i-- > 0;) grid->waiting.push_back(i);
    tsan::release(&grid->place);
    stream.queue.push_back(grid);
    ++events;
  }

  void start_blocks() {
    for (auto& [number, stream] : streams) {
      if (stream.queue.empty()) continue;
      Grid* grid = stream.queue.front();
      while (!grid->waiting.empty()) {
        int& resident = residents[grid->launch.device];
        if (options.max_resident > 0 && resident >= options.max_resident) break;
        ++resident;
        const uint32_t last = grid->waiting.size() - 1;
        if (options.seed != 0 && random.one_in(2)) {
          std::swap(grid->waiting[last], grid->waiting[random.below(last + 1)]);
        }
        const uint32_t index = grid->waiting.back();
        grid->waiting.pop_back();
        start(grid, index);
      }
    }
  }

  void start(Grid* grid, uint32_t index) {
    Block* block = new Block;
    const Launch& launch = grid->launch;
    block->grid = grid;
    block->counts = &counts[launch.first_rank + index / launch.blocks_x];
    block->shared = spare_shared.empty() ? new_pages(kSharedBytes) : taken(spare_shared);
    std::memset(block->shared, 0xa5, kSharedBytes);
    block->warps.resize(launch.threads / 32);
    block->fibers.resize(launch.threads);
    block->ready.reserve(launch.threads);
    block->batch.reserve(launch.threads);
    for (uint32_t i = 0; i < launch.threads; ++i) {
      Fiber& fiber = block->fibers[i];
      fiber.thread = i;
      fiber.threads = launch.threads;
      fiber.block_x = index % launch.blocks_x;
      fiber.block_y = index / launch.blocks_x;
      fiber.blocks_x = launch.blocks_x;
      fiber.blocks_y = launch.blocks_y;
      fiber.block = block;
      if (spare_stacks.empty()) {
        char* stacks = new_pages((launch.threads - i) * kStackBytes);
        for (uint32_t k = launch.threads; k-- > i;)
          spare_stacks.push_back(stacks + (k - i) * kStackBytes);
      }
      fiber.stack = taken(spare_stacks);
      make_context(fiber.context, fiber.stack, kStackBytes, &enter);
      fiber.tsan = tsan::create();
      block->ready.push_back(i);
    }
    draw_mood(*block);
    ++grid->running;
    live.push_back(block);
    ++events;
  }

  static void acquire(Stream& stream) {
    for (char& place : stream.places) tsan::acquire(&place);
  }

  /// Runs in the fiber.
  static void enter() {
    Fiber& fiber = *static_cast<Fiber*>(self);
    Impl* impl = running_world(fiber);
    Grid* grid = fiber.block->grid;
    tsan::acquire(&grid->place);
    tsan::acquire(&grid->stream->places[(grid->number + 1) % 2]);
    try {
      grid->launch.body();
    } catch (const std::exception& error) {
      impl->error = error.what();
    }
    tsan::release(&grid->stream->places[grid->number % 2]);
    fiber.state = State::kOver;
    impl->to_scheduler(fiber);
  }

  void to_scheduler(Fiber& fiber) {
    tsan::switch_to(main_tsan);
    switch_context(fiber.context, main_context);
  }

  void drop(Block* block) {
    for (Fiber& fiber : block->fibers) {
      if (fiber.tsan != nullptr) tsan::destroy(fiber.tsan);
      if (!tsan::kOn) spare_stacks.push_back(fiber.stack);
    }
    if (tsan::kOn) {  // new pages each time: another thread's stack must look new to it
      munmap(block->fibers[0].stack, block->fibers.size() * kStackBytes);
      munmap(block->shared, kSharedBytes);
    } else {
      spare_shared.push_back(block->shared);
    }
    delete block;
  }

  void end(Block* block) {
    for (const Fiber& fiber : block->fibers) {
      uint64_t lowest;
      std::memcpy(&lowest, fiber.stack, sizeof lowest);
      if (lowest != 0) error = text_of("thread %llu has used up its stack", fiber.thread);
    }
    Grid* grid = block->grid;
    --residents[grid->launch.device];
    --grid->running;
    drop(block);
    ++events;
    if (grid->running > 0 || !grid->waiting.empty()) return;
    grid->stream->queue.pop_front();
    const auto ended = std::move(grid->launch.ended);
    if (tsan::kOn) {
      ended_grids.push_back(grid);  // to delete it now would race with its threads
    } else {
      delete grid;
    }
    if (ended) ended();
  }

  // --- turns ---
  void draw_mood(Block& block) {
    Mood mood;
    if (options.seed != 0) {
      constexpr uint32_t kSpeeds[] = {1, 1, 1, 1, 4, 16, 16, 256};
      mood.one_turn_in = kSpeeds[random.below(8)];
      mood.order = static_cast<Mood::Order>(random.below(4));
      constexpr uint32_t kBudgets[] = {0, 0, 0, 200, 20, 3};
      mood.budget = kBudgets[random.below(6)];
      constexpr uint32_t kYields[] = {0, 2, 4, 16};
      mood.yield_in = kYields[random.below(4)];
    }
    block.mood = mood;
  }

  bool advance() {
    start_blocks();
    if (live.empty()) return false;
    const uint64_t before = events;
    const bool new_moods = options.seed != 0 && random.one_in(64);
    const uint32_t first = options.seed != 0 ? random.below(live.size()) : 0;
    for (uint32_t i = 0; i < live.size(); ++i) {
      Block& block = *live[(first + i) % live.size()];
      if (new_moods && random.one_in(2)) draw_mood(block);
      if (block.mood.one_turn_in == 1 || random.one_in(block.mood.one_turn_in)) turn(block);
      if (!error.empty()) throw Fault(error + "\n" + report());
    }
    for (size_t i = live.size(); i-- > 0;) {
      Block* block = live[i];
      if (block->over < block->fibers.size()) continue;
      live.erase(live.begin() + i);
      end(block);
    }
    if (!error.empty()) throw Fault(error);
    watch(events != before);
    return true;
  }

  void turn(Block& block) {
    block.batch.clear();
    block.batch.swap(block.ready);
    size_t chosen = block.batch.size();
    if (block.mood.order == Mood::kBackward) {
      std::reverse(block.batch.begin(), block.batch.end());
    } else if (block.mood.order != Mood::kForward) {
      for (size_t i = chosen; i > 1; --i) {
        std::swap(block.batch[i - 1], block.batch[random.below(i)]);
      }
      if (block.mood.order == Mood::kFew && chosen > 1) chosen = 1 + random.below(chosen);
    }
    for (size_t i = 0; i < block.batch.size(); ++i) {
      Fiber& fiber = block.fibers[block.batch[i]];
      if (i < chosen && !polls_in_vain(fiber)) {
        run(fiber);
        if (!error.empty()) return;
      } else {
        block.ready.push_back(block.batch[i]);
      }
    }
  }

  /// A poll that would see what it saw before. Now and then it runs all the same: it may count
  /// polls.
  bool polls_in_vain(const Fiber& fiber) {
    return fiber.state == State::kPausing && fiber.paused_at == events &&
           !options.outside_writers && !random.one_in(8);
  }

  void run(Fiber& fiber) {
    const uint32_t budget = fiber.block->mood.budget;
    fiber.budget = budget == 0 ? kForLong : static_cast<int32_t>(random.below(budget));
    fiber.state = State::kReady;
    self = &fiber;
    current = this;
    ++turns;
    tsan::switch_to(fiber.tsan);
    switch_context(main_context, fiber.context);
    self = nullptr;
    if (fiber.state == State::kOver) {
      if (fiber.tsan != nullptr) tsan::destroy(fiber.tsan);
      fiber.tsan = nullptr;
      ++fiber.block->over;
      ++events;
    } else if (fiber.state == State::kReady || fiber.state == State::kPausing) {
      fiber.block->ready.push_back(fiber.thread);
    }
  }

  // --- barriers, run in fibers ---
  void wait_at(Fiber& fiber, Barrier& barrier, State state, uint32_t first, uint32_t count,
               bool orders_memory) {
    const uint32_t turn = barrier.generation % 2;
    char* place = &barrier.places[turn];
    if (orders_memory) tsan::release(place);
    if (fiber.saw_abort) barrier.saw_abort[turn] = true;
    if (++barrier.arrived == count) {
      barrier.arrived = 0;
      ++barrier.generation;
      Block& block = *fiber.block;
      for (uint32_t i = first; i < first + count; ++i) {
        if (block.fibers[i].state == state) {
          block.fibers[i].state = State::kReady;
          block.ready.push_back(i);
        }
      }
    } else {
      fiber.state = state;
      to_scheduler(fiber);
    }
    if (barrier.saw_abort[turn]) fiber.saw_abort = true;
    if (orders_memory) tsan::acquire(place);
  }

  // --- is anything moving? ---
  void watch(bool moved) {
    if (moved) {
      idle_sweeps = 0;
    } else {
      ++idle_sweeps;
      if (options.seed != 0 && idle_sweeps % 16 == 0) {
        for (Block* block : live) draw_mood(*block);  // do not wait for one that stands still
      }
    }
    if ((++sweeps % 256 == 0 || idle_sweeps > kIdleBeforeRest) && options.limit_s > 0) {
      const std::chrono::duration<double> spent = std::chrono::steady_clock::now() - begin;
      if (spent.count() > options.limit_s) {
        char text[80];
        std::snprintf(text, sizeof text, "not over after %g s", options.limit_s);
        throw Stuck(text + ("\n" + report()));
      }
    }
    if (options.outside_writers) {
      if (idle_sweeps > kIdleBeforeRest)
        idle_sweeps < 4096 ? void(sched_yield()) : void(usleep(50));
      return;
    }
    if (!live.empty() && idle_sweeps > 0 &&
        std::all_of(live.begin(), live.end(), [&](Block* block) {
          if (block->ready.empty()) return true;
          return block->pauses_since == events && block->pauses >= options.patience;
        })) {
      throw Stuck("deadlock: nothing moves any more\n" + report());
    }
  }

  // --- reports ---
  std::string state_of(const Fiber& fiber) const {
    switch (fiber.state) {
      case State::kOver:
        return "over";
      case State::kBlockBarrier:
        return text_of("at the block's barrier (%llu of %llu have come)",
                       fiber.block->barrier.arrived, fiber.threads);
      case State::kWarpBarrier:
        return "at a warp's barrier";
      default:
        break;
    }
    if (fiber.polled == nullptr) return "running";
    const MemoryMap* map = options.memory;
    const std::string what = map != nullptr
                                 ? map->describe(fiber.polled, fiber.seen)
                                 : text_of("%#llx = %llu", uintptr_t(fiber.polled), fiber.seen);
    return "polling " + what;
  }

  std::string report() const {
    std::string text;
    for (const Block* block : live) {
      const Fiber& any = block->fibers[0];
      const Launch& launch = block->grid->launch;
      text += launch.name + text_of(" (launch %llu), rank %llu, block %llu:", block->grid->number,
                                    launch.first_rank + any.block_y, any.block_x);
      uint32_t from = 0;
      for (uint32_t i = 1; i <= block->fibers.size(); ++i) {
        if (i < block->fibers.size() && state_of(block->fibers[i]) == state_of(block->fibers[from]))
          continue;
        text += i - from == 1 ? text_of(" thread %llu ", from)
                              : text_of(" threads %llu-%llu ", from, i - 1);
        text += state_of(block->fibers[from]) + (i < block->fibers.size() ? ";" : "");
        from = i;
      }
      text += "\n";
    }
    for (const auto& [number, stream] : streams) {
      for (const Grid* grid : stream.queue) {
        if (grid->waiting.empty()) continue;
        text +=
            grid->launch.name + text_of(" (launch %llu on stream %llu): ", grid->number, number);
        text += text_of("%llu blocks have not started", grid->waiting.size());
        if (grid != stream.queue.front()) {
          text += ", a launch before is not over\n";
        } else {
          text += text_of(": %llu are resident, and no more may be\n",
                          residents.at(grid->launch.device));
        }
      }
    }
    return text;
  }

  WorldOptions options;
  Random random;
  std::map<int, Stream> streams;
  std::map<int, uint64_t> launches;
  std::map<int, int> residents;
  std::map<int, RankCounts> counts;
  std::vector<Block*> live;
  std::vector<Grid*> ended_grids;
  uint64_t events = 0, turns = 0, sweeps = 0, idle_sweeps = 0;
  std::string error;
  Context main_context;
  void* main_tsan = nullptr;
  std::chrono::steady_clock::time_point begin;
  static constinit thread_local Impl* current;
};

constinit thread_local World::Impl* World::Impl::current = nullptr;

namespace {

World::Impl* running_world(const Fiber&) { return World::Impl::current; }
World::Impl& world() { return *World::Impl::current; }
Fiber& fiber() { return *static_cast<Fiber*>(self); }

}  // namespace

World::World(const WorldOptions& options) : impl_(std::make_unique<Impl>(options)) {}
World::~World() = default;
void World::launch(Launch launch) { impl_->launch(std::move(launch)); }
bool World::advance() { return impl_->advance(); }
void World::run() {
  while (impl_->advance()) {
  }
  for (const auto& [number, stream] : impl_->streams) acquire(number);
}
void World::acquire(int stream) {
  const auto found = impl_->streams.find(stream);
  if (found != impl_->streams.end()) Impl::acquire(found->second);
}
uint64_t World::turns() const { return impl_->turns; }
std::string World::report() const { return impl_->report(); }
const RankCounts& World::counts(int rank) const { return impl_->counts[rank]; }

// --- device.h
// ---------------------------------------------------------------------------------------
void fail(const char* text) {
  const Fiber& f = fiber();
  throw Fault(f.block->grid->launch.name +
              text_of(", rank %llu, block %llu, thread %llu: ",
                      f.block->grid->launch.first_rank + f.block_y, f.block_x, f.thread) +
              text);
}

namespace {

/// The region of an access; fails if there is none. Null without a map.
const Region* checked(const void* place, uint32_t size, const char* what) {
  if (reinterpret_cast<uintptr_t>(place) % size != 0) {
    fail((what + text_of(" of %llu bytes at the misaligned place %#llx", size,
                         reinterpret_cast<uintptr_t>(place)))
             .c_str());
  }
  const MemoryMap* map = world().options.memory;
  if (map == nullptr || !world().options.check) return nullptr;
  const Region* region = map->find(place, size);
  if (region == nullptr) {
    const Region* near = map->find(static_cast<const char*>(place) - 1, 1);
    if (near == nullptr) near = map->find(static_cast<const char*>(place) - 64, 1);
    fail((what + text_of(" of %llu bytes outside of all memory that it may touch", size) +
          (near != nullptr ? ", behind " + near->name : ""))
             .c_str());
  }
  return region;
}

}  // namespace

bool check_data(const void* place, uint32_t size, bool write) {
  const Region* region = checked(place, size, write ? "store" : "load");
  if (region == nullptr) return true;
  const bool seen_by_others = region->kind != MemoryClass::kState;
  if (!world().options.count) return seen_by_others;
  Fiber& f = fiber();
  const bool remote = region->owner != f.block->grid->launch.first_rank + int(f.block_y);
  AccessCounts& counts = f.block->counts->data[static_cast<int>(region->kind)][remote];
  (write ? counts.written_bytes : counts.read_bytes) += size;
  if (size == 16) {
    ++(write ? counts.wide_writes : counts.wide_reads);
  } else {
    ++(write ? counts.small_writes : counts.small_reads);
  }
  return seen_by_others;
}

void before_flag(const void* place, uint32_t size, FlagAccess access, uint64_t) {
  Fiber& f = fiber();
  const uint32_t yield_in = f.block->mood.yield_in;
  if (yield_in != 0 && world().random.one_in(yield_in)) yield();
  const Region* region = checked(place, size, "access to a flag");
  if (region != nullptr && region->kind == MemoryClass::kState) return;  // the rank's own matter
  RankCounts& counts = *f.block->counts;
  switch (access) {
    case FlagAccess::kPoll:
      ++counts.polls;
      break;
    case FlagAccess::kAcquire:
      ++counts.acquires;
      break;
    case FlagAccess::kPacketPoll:
      ++counts.packet_polls;
      break;
    case FlagAccess::kStore:
      ++counts.flag_stores;
      break;
    case FlagAccess::kPacketStore:
      ++counts.packet_stores;
      break;
    case FlagAccess::kWord:
      return;
  }
  const bool stores = access == FlagAccess::kStore || access == FlagAccess::kPacketStore;
  if (stores && f.saw_abort) fail("published after it saw the abort word");
}

void after_flag(const void* place, FlagAccess access, uint64_t value) {
  Fiber& f = fiber();
  if (access == FlagAccess::kStore || access == FlagAccess::kPacketStore) {
    ++world().events;
  } else if (access == FlagAccess::kWord) {
    const MemoryMap* map = world().options.memory;
    const Region* region = value != 0 && map != nullptr ? map->find(place, 4) : nullptr;
    if (region != nullptr && region->abort_word) f.saw_abort = true;
    return;
  } else {
    f.polled = place;
    f.seen = value;
  }
  const uint32_t yield_in = f.block->mood.yield_in;
  if (yield_in != 0 && world().random.one_in(yield_in)) yield();
}

void yield() {
  fiber().state = State::kReady;
  world().to_scheduler(fiber());
}

void pause() {
  Fiber& f = fiber();
  Block& block = *f.block;
  if (block.pauses_since != world().events) block.pauses = 0;
  block.pauses_since = world().events;
  ++block.pauses;
  f.paused_at = world().events;
  f.state = State::kPausing;
  world().to_scheduler(f);
}

void count_fence() {
  ++fiber().block->counts->fences;
  const uint32_t yield_in = fiber().block->mood.yield_in;
  if (yield_in != 0 && world().random.one_in(yield_in)) yield();
}

void block_barrier() {
  Fiber& f = fiber();
  f.fenced = false;
  const uint32_t generation = f.block->barrier.generation;
  world().wait_at(f, f.block->barrier, State::kBlockBarrier, 0, f.threads, true);
  if (f.block->barrier.generation != generation) ++world().events;
}

namespace {

void meet_warp(bool orders_memory) {
  Fiber& f = fiber();
  f.fenced = f.fenced && !orders_memory;
  world().wait_at(f, f.block->warps[f.thread / 32].barrier, State::kWarpBarrier, f.thread / 32 * 32,
                  32, orders_memory);
}

}  // namespace

void warp_barrier() { meet_warp(true); }

const uint32_t* warp_exchange(uint32_t value) {
  Fiber& f = fiber();
  Warp& warp = f.block->warps[f.thread / 32];
  uint32_t* given = warp.given[warp.barrier.generation % 2];
  given[f.thread % 32] = value;
  meet_warp(false);
  return given;
}

void* shared_memory(const void* key, size_t bytes, size_t alignment) {
  Block& block = *fiber().block;
  SharedVariable* variable = block.variables;
  for (; variable->key != nullptr; ++variable) {
    if (variable->key == key) return variable->place;
  }
  if (variable == block.variables + kSharedVariables - 1) fail("too many shared variables");
  const size_t at = (block.shared_used + alignment - 1) / alignment * alignment;
  if (at + bytes > kSharedBytes) fail("more than 48 KiB of shared memory");
  block.shared_used = at + bytes;
  *variable = SharedVariable{key, block.shared + at};
  return block.shared + at;
}

}  // namespace dpcomm::emulated
