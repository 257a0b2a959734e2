#include "scheduler.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>

#include "tsan.h"

namespace dpcomm::emulated {

constinit thread_local Thread* self = nullptr;
constinit thread_local Scheduler* running_scheduler = nullptr;

namespace {

constexpr uint64_t kIdleBeforeRest = 64;  // sweeps without progress, then others get the core
constexpr int32_t kForLong = INT32_MAX;

// Pages that worlds on this OS thread have left, to be used again.
thread_local std::vector<char*> spare_stacks;
thread_local std::vector<char*> spare_shared;

char* taken(std::vector<char*>& spare) {
  char* pages = spare.back();
  spare.pop_back();
  return pages;
}

/// A stack, of which `more` will be asked for.
char* take_stack(size_t more) {
  if (spare_stacks.empty()) {
    char* stacks = map_pages(more * kStackBytes);
    for (size_t i = more; i-- > 0;) spare_stacks.push_back(stacks + i * kStackBytes);
  }
  return taken(spare_stacks);
}

void acquire_ended(Stream& stream) {
  for (char& place : stream.places) tsan::acquire(&place);
}

}  // namespace

Scheduler::Scheduler(const WorldOptions& given)
    : options_(given), random_(given.seed * 0x9e3779b97f4a7c15u + 1) {
  main_tsan_ = tsan::current();
  begin_ = std::chrono::steady_clock::now();
}

Scheduler::~Scheduler() {
  for (Block* block : live_) drop(block);
  for (auto& [number, stream] : streams_) acquire_ended(stream);
  for (Grid* grid : ended_grids_) delete grid;
  // What threads that never ended have touched may not be freed in the eyes of ThreadSanitizer.
  for (auto& [number, stream] : streams_) {
    for (Grid* grid : stream.queue) {
      if (!tsan::kOn) delete grid;
    }
  }
}

void Scheduler::launch(Launch launch) {
  if (launch.threads == 0 || launch.threads % 32 != 0 || launch.threads > 1024) {
    throw std::logic_error(text_of("blocks of %llu threads", launch.threads));
  }
  Stream& stream = streams_[launch.stream];
  Grid* grid = new Grid;
  grid->number = ++launches_[launch.stream];
  grid->stream = &stream;
  grid->launch = std::move(launch);
  const uint32_t blocks = grid->launch.blocks_x * grid->launch.blocks_y;
  for (uint32_t i = blocks; i-- > 0;) grid->waiting.push_back(i);
  tsan::release(&grid->place);
  stream.queue.push_back(grid);
  ++events_;
}

void Scheduler::start_blocks() {
  for (auto& [number, stream] : streams_) {
    if (stream.queue.empty()) continue;
    Grid* grid = stream.queue.front();
    while (!grid->waiting.empty()) {
      int& resident = residents_[grid->launch.device];
      if (options_.max_resident > 0 && resident >= options_.max_resident) break;
      ++resident;
      const uint32_t last = grid->waiting.size() - 1;
      if (options_.seed != 0 && random_.one_in(2)) {
        std::swap(grid->waiting[last], grid->waiting[random_.below(last + 1)]);
      }
      const uint32_t index = grid->waiting.back();
      grid->waiting.pop_back();
      start(grid, index);
    }
  }
}

void Scheduler::start(Grid* grid, uint32_t index) {
  Block* block = new Block;
  const Launch& launch = grid->launch;
  block->grid = grid;
  block->counts = &counts_[launch.first_rank + index / launch.blocks_x];
  block->shared = spare_shared.empty() ? map_pages(kSharedBytes) : taken(spare_shared);
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
    fiber.stack = take_stack(launch.threads - i);
    make_context(fiber.context, fiber.stack, kStackBytes, &enter);
    fiber.tsan = tsan::create();
    block->ready.push_back(i);
  }
  draw_mood(*block);
  ++grid->running;
  live_.push_back(block);
  ++events_;
}

/// Where a thread begins, in its fiber.
void Scheduler::enter() {
  Fiber& fiber = *static_cast<Fiber*>(self);
  Scheduler* scheduler = running_scheduler;
  Grid* grid = fiber.block->grid;
  tsan::acquire(&grid->place);
  tsan::acquire(&grid->stream->places[(grid->number + 1) % 2]);
  try {
    grid->launch.body();
  } catch (const std::exception& error) {
    scheduler->error_ = error.what();
  }
  tsan::release(&grid->stream->places[grid->number % 2]);
  fiber.state = State::kOver;
  scheduler->leave(fiber);
}

void Scheduler::leave(Fiber& fiber) {
  tsan::switch_to(main_tsan_);
  switch_context(fiber.context, main_context_);
}

void Scheduler::end(Block* block) {
  for (const Fiber& fiber : block->fibers) {
    uint64_t lowest;
    std::memcpy(&lowest, fiber.stack, sizeof lowest);
    if (lowest != 0) error_ = text_of("thread %llu has used up its stack", fiber.thread);
  }
  Grid* grid = block->grid;
  --residents_[grid->launch.device];
  --grid->running;
  drop(block);
  ++events_;
  if (grid->running > 0 || !grid->waiting.empty()) return;
  grid->stream->queue.pop_front();
  const auto ended = std::move(grid->launch.ended);
  if (tsan::kOn) {
    ended_grids_.push_back(grid);  // to delete it now would race with its threads
  } else {
    delete grid;
  }
  if (ended) ended();
}

void Scheduler::drop(Block* block) {
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

void Scheduler::acquire(int stream) {
  const auto found = streams_.find(stream);
  if (found != streams_.end()) acquire_ended(found->second);
}

void Scheduler::acquire_all() {
  for (auto& [number, stream] : streams_) acquire_ended(stream);
}

// --- turns ---------------------------------------------------------------------------------------

void Scheduler::draw_mood(Block& block) {
  Mood mood;
  if (options_.seed != 0) {
    constexpr uint32_t kSpeeds[] = {1, 1, 1, 1, 4, 16, 16, 256};
    mood.one_turn_in = kSpeeds[random_.below(8)];
    mood.order = static_cast<Mood::Order>(random_.below(4));
    constexpr uint32_t kBudgets[] = {0, 0, 0, 200, 20, 3};
    mood.budget = kBudgets[random_.below(6)];
    constexpr uint32_t kYields[] = {0, 2, 4, 16};
    mood.yield_in = kYields[random_.below(4)];
  }
  block.mood = mood;
}

bool Scheduler::advance() {
  start_blocks();
  if (live_.empty()) return false;
  const uint64_t before = events_;
  const bool new_moods = options_.seed != 0 && random_.one_in(64);
  const uint32_t first = options_.seed != 0 ? random_.below(live_.size()) : 0;
  for (uint32_t i = 0; i < live_.size(); ++i) {
    Block& block = *live_[(first + i) % live_.size()];
    if (new_moods && random_.one_in(2)) draw_mood(block);
    if (block.mood.one_turn_in == 1 || random_.one_in(block.mood.one_turn_in)) turn(block);
    if (!error_.empty()) throw Fault(error_ + "\n" + report());
  }
  for (size_t i = live_.size(); i-- > 0;) {
    Block* block = live_[i];
    if (block->over < block->fibers.size()) continue;
    live_.erase(live_.begin() + i);
    end(block);
  }
  if (!error_.empty()) throw Fault(error_);
  watch(events_ != before);
  return true;
}

void Scheduler::turn(Block& block) {
  block.batch.clear();
  block.batch.swap(block.ready);
  size_t chosen = block.batch.size();
  if (block.mood.order == Mood::kBackward) {
    std::reverse(block.batch.begin(), block.batch.end());
  } else if (block.mood.order != Mood::kForward) {
    for (size_t i = chosen; i > 1; --i) {
      std::swap(block.batch[i - 1], block.batch[random_.below(i)]);
    }
    if (block.mood.order == Mood::kFew && chosen > 1) chosen = 1 + random_.below(chosen);
  }
  for (size_t i = 0; i < block.batch.size(); ++i) {
    Fiber& fiber = block.fibers[block.batch[i]];
    if (i < chosen && !polls_in_vain(fiber)) {
      run(fiber);
      if (!error_.empty()) return;
    } else {
      block.ready.push_back(block.batch[i]);
    }
  }
}

/// A poll that would see what it saw before. Now and then it runs all the same: it may count
/// polls.
bool Scheduler::polls_in_vain(const Fiber& fiber) {
  return fiber.state == State::kPausing && fiber.paused_at == events_ &&
         !options_.outside_writers && !random_.one_in(8);
}

void Scheduler::run(Fiber& fiber) {
  const uint32_t budget = fiber.block->mood.budget;
  fiber.budget = budget == 0 ? kForLong : static_cast<int32_t>(random_.below(budget));
  fiber.state = State::kReady;
  self = &fiber;
  running_scheduler = this;
  ++turns_;
  tsan::switch_to(fiber.tsan);
  switch_context(main_context_, fiber.context);
  self = nullptr;
  if (fiber.state == State::kOver) {
    if (fiber.tsan != nullptr) tsan::destroy(fiber.tsan);
    fiber.tsan = nullptr;
    ++fiber.block->over;
    ++events_;
  } else if (fiber.state == State::kReady || fiber.state == State::kPausing) {
    fiber.block->ready.push_back(fiber.thread);
  }
}

void Scheduler::meet(Fiber& fiber, Barrier& barrier, State state, uint32_t first, uint32_t count,
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
    leave(fiber);
  }
  if (barrier.saw_abort[turn]) fiber.saw_abort = true;
  if (orders_memory) tsan::acquire(place);
}

/// Is anything moving?
void Scheduler::watch(bool moved) {
  idle_sweeps_ = moved ? 0 : idle_sweeps_ + 1;
  if (options_.seed != 0 && idle_sweeps_ % 16 == 15) {
    for (Block* block : live_) draw_mood(*block);  // do not wait for one that stands still
  }
  if (++sweeps_ % 256 == 0 || idle_sweeps_ > kIdleBeforeRest) check_time();
  if (options_.outside_writers) {
    if (idle_sweeps_ <= kIdleBeforeRest) return;
    idle_sweeps_ < 4096 ? void(sched_yield()) : void(usleep(50));
    return;
  }
  const auto waits = [&](const Block* block) {
    return block->ready.empty() ||
           (block->pauses_since == events_ && block->pauses >= options_.patience);
  };
  if (idle_sweeps_ > 0 && !live_.empty() && std::all_of(live_.begin(), live_.end(), waits)) {
    throw Stuck("deadlock: nothing moves any more\n" + report());
  }
}

void Scheduler::check_time() const {
  if (options_.limit_s <= 0) return;
  const std::chrono::duration<double> spent = std::chrono::steady_clock::now() - begin_;
  if (spent.count() <= options_.limit_s) return;
  char text[80];
  std::snprintf(text, sizeof text, "not over after %g s\n", options_.limit_s);
  throw Stuck(text + report());
}

}  // namespace dpcomm::emulated
