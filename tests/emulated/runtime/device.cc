// What running threads call (device.h).
#include "device.h"

#include "scheduler.h"

namespace dpcomm::emulated {
namespace {

Scheduler& scheduler() { return *running_scheduler; }
Fiber& fiber() { return *static_cast<Fiber*>(self); }

}  // namespace

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
  const MemoryMap* map = scheduler().options().memory;
  if (map == nullptr || !scheduler().options().check) return nullptr;
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
  if (!scheduler().options().count) return seen_by_others;
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
  if (yield_in != 0 && scheduler().random().one_in(yield_in)) yield();
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
    scheduler().note_event();
  } else if (access == FlagAccess::kWord) {
    const MemoryMap* map = scheduler().options().memory;
    const Region* region = value != 0 && map != nullptr ? map->find(place, 4) : nullptr;
    if (region != nullptr && region->abort_word) f.saw_abort = true;
    return;
  } else {
    f.polled = place;
    f.seen = value;
  }
  const uint32_t yield_in = f.block->mood.yield_in;
  if (yield_in != 0 && scheduler().random().one_in(yield_in)) yield();
}

void yield() {
  fiber().state = State::kReady;
  scheduler().leave(fiber());
}

void pause() {
  Fiber& f = fiber();
  Block& block = *f.block;
  if (block.pauses_since != scheduler().events()) block.pauses = 0;
  block.pauses_since = scheduler().events();
  ++block.pauses;
  f.paused_at = scheduler().events();
  f.state = State::kPausing;
  scheduler().leave(f);
}

void count_fence() {
  ++fiber().block->counts->fences;
  const uint32_t yield_in = fiber().block->mood.yield_in;
  if (yield_in != 0 && scheduler().random().one_in(yield_in)) yield();
}

void block_barrier() {
  Fiber& f = fiber();
  f.fenced = false;
  const uint32_t generation = f.block->barrier.generation;
  scheduler().meet(f, f.block->barrier, State::kBlockBarrier, 0, f.threads, true);
  if (f.block->barrier.generation != generation) scheduler().note_event();
}

namespace {

void meet_warp(bool orders_memory) {
  Fiber& f = fiber();
  f.fenced = f.fenced && !orders_memory;
  scheduler().meet(f, f.block->warps[f.thread / 32].barrier, State::kWarpBarrier,
                   f.thread / 32 * 32, 32, orders_memory);
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
