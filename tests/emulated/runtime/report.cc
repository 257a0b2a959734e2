// What a run that came to an end too early tells: which thread waits for what.
#include <cstdio>

#include "scheduler.h"

namespace dpcomm::emulated {

std::string text_of(const char* format, uint64_t a, uint64_t b, uint64_t c) {
  char text[160];
  std::snprintf(text, sizeof text, format, static_cast<unsigned long long>(a),
                static_cast<unsigned long long>(b), static_cast<unsigned long long>(c));
  return text;
}

std::string Scheduler::state_of(const Fiber& fiber) const {
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
  const MemoryMap* map = options_.memory;
  const std::string what = map != nullptr
                               ? map->describe(fiber.polled, fiber.seen)
                               : text_of("%#llx = %llu", uintptr_t(fiber.polled), fiber.seen);
  return "polling " + what;
}

/// A line: threads one after the other in the same state are told of together.
std::string Scheduler::report(const Block& block) const {
  const Launch& launch = block.grid->launch;
  std::string text =
      launch.name + text_of(" (launch %llu), rank %llu, block %llu:", block.grid->number,
                            launch.first_rank + block.fibers[0].block_y, block.fibers[0].block_x);
  const uint32_t threads = block.fibers.size();
  for (uint32_t first = 0, end = 0; first < threads; first = end) {
    const std::string state = state_of(block.fibers[first]);
    for (end = first + 1; end < threads && state_of(block.fibers[end]) == state;) ++end;
    text += end - first == 1 ? text_of(" thread %llu ", first)
                             : text_of(" threads %llu-%llu ", first, end - 1);
    text += state + (end < threads ? ";" : "\n");
  }
  return text;
}

/// A line, for a grid of which blocks have not started.
std::string Scheduler::report(int stream, const Grid& grid) const {
  const std::string text = grid.launch.name +
                           text_of(" (launch %llu on stream %llu): ", grid.number, stream) +
                           text_of("%llu blocks have not started", grid.waiting.size());
  if (&grid != streams_.at(stream).queue.front()) return text + ", a launch before is not over\n";
  return text +
         text_of(": %llu are resident, and no more may be\n", residents_.at(grid.launch.device));
}

std::string Scheduler::report() const {
  std::string text;
  for (const Block* block : live_) text += report(*block);
  for (const auto& [number, stream] : streams_) {
    for (const Grid* grid : stream.queue) {
      if (!grid->waiting.empty()) text += report(number, *grid);
    }
  }
  return text;
}

}  // namespace dpcomm::emulated
