// A stand-in for std::atomic and futex that shows what an unlucky machine does with them.
//
// Threads are fibers of one thread. At every atomic operation a seeded scheduler decides who goes
// on and which buffered stores become visible. A store that is not seq_cst first lies in its
// thread's store buffer: its own loads see it, other threads do not. Stores leave the buffer in any
// order, but a release store after all before it, and stores to one place in order. A seq_cst store
// or a read-modify-write empties the buffer first. So x86's store buffer and the reordering of
// stores of weaker machines are there; the reordering of loads is not.
//
// A wait that nobody will end is seen at once, without a clock: all fibers wait, none can run.
#pragma once

#include <linux/futex.h>
#include <ucontext.h>

#include <atomic>
#include <cstdint>
#include <cstring>
#include <ctime>
#include <functional>
#include <memory>
#include <random>
#include <vector>

namespace model {

class World {
 public:
  using Body = std::function<void()>;

  /// Runs the bodies to their end, interleaved by `seed`. False: those left wait for ever.
  bool run(uint64_t seed, const std::vector<Body>& bodies);

  /// The world that runs, or null: atomics are plain memory then.
  static World* active() { return active_; }

  /// Others may go on here, and stores become visible.
  void step();
  void buffer(void* place, uint64_t value, size_t bytes, bool release);
  /// The newest buffered value of this fiber for a place, if there is one.
  bool own_store(const void* place, uint64_t* value) const;
  void empty_buffer() { drain_all(*fibers_[current_]); }
  void wait_on(const void* place);
  void wake_all(const void* place);

 private:
  struct Store {
    void* place;
    uint64_t value;
    size_t bytes;
    bool release;
  };
  struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    Body body;
    std::vector<Store> stores;
    const void* waits_on = nullptr;
    bool over = false;
  };

  static void enter();
  static void make_visible(Fiber& fiber, size_t index);
  static void drain_all(Fiber& fiber);
  void drain_some();

  static inline World* active_ = nullptr;
  std::minstd_rand random_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  size_t current_ = 0;
  ucontext_t scheduler_;
};

inline void World::enter() {
  World& world = *active_;
  Fiber& self = *world.fibers_[world.current_];
  self.body();
  self.over = true;
  swapcontext(&self.context, &world.scheduler_);
}

inline bool World::run(uint64_t seed, const std::vector<Body>& bodies) {
  constexpr size_t kStackBytes = size_t{256} << 10;
  random_.seed(static_cast<uint32_t>(seed));
  fibers_.clear();
  active_ = this;
  for (const Body& body : bodies) {
    fibers_.push_back(std::make_unique<Fiber>());
    Fiber& fiber = *fibers_.back();
    fiber.stack.reset(new char[kStackBytes]);
    fiber.body = body;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, &World::enter, 0);
  }
  for (;;) {
    std::vector<size_t> ready;
    bool left = false;
    for (size_t i = 0; i < fibers_.size(); ++i) {
      left |= !fibers_[i]->over;
      if (!fibers_[i]->over && fibers_[i]->waits_on == nullptr) ready.push_back(i);
    }
    if (ready.empty()) {
      for (const auto& fiber : fibers_) drain_all(*fiber);
      active_ = nullptr;
      return !left;
    }
    current_ = ready[random_() % ready.size()];
    swapcontext(&scheduler_, &fibers_[current_]->context);
  }
}

inline void World::step() {
  drain_some();
  Fiber& self = *fibers_[current_];
  swapcontext(&self.context, &scheduler_);
}

inline void World::buffer(void* place, uint64_t value, size_t bytes, bool release) {
  fibers_[current_]->stores.push_back(Store{place, value, bytes, release});
}

inline bool World::own_store(const void* place, uint64_t* value) const {
  bool found = false;
  for (const Store& store : fibers_[current_]->stores) {
    if (store.place != place) continue;
    *value = store.value;
    found = true;
  }
  return found;
}

inline void World::make_visible(Fiber& fiber, size_t index) {
  const Store store = fiber.stores[index];
  std::memcpy(store.place, &store.value, store.bytes);  // little-endian
  fiber.stores.erase(fiber.stores.begin() + static_cast<std::ptrdiff_t>(index));
}

inline void World::drain_all(Fiber& fiber) {
  while (!fiber.stores.empty()) make_visible(fiber, 0);
}

inline void World::drain_some() {
  for (const auto& fiber : fibers_) {
    while (!fiber->stores.empty() && random_() % 3 == 0) {
      size_t index = random_() % fiber->stores.size();
      for (size_t before = 0; before < index; ++before) {
        if (fiber->stores[before].place == fiber->stores[index].place) index = before;
      }
      make_visible(*fiber, fiber->stores[index].release ? 0 : index);
    }
  }
}

inline void World::wait_on(const void* place) {
  fibers_[current_]->waits_on = place;
  step();
}

inline void World::wake_all(const void* place) {
  for (const auto& fiber : fibers_) {
    if (fiber->waits_on == place) fiber->waits_on = nullptr;
  }
}

/// As std::atomic, as far as transport/slot_ring.h uses it.
template <class T>
class atomic {
 public:
  static constexpr bool is_always_lock_free = true;
  atomic() = default;
  constexpr atomic(T value) : value_(value) {}

  T load(std::memory_order = std::memory_order_seq_cst) const {
    uint64_t own = 0;
    if (World* world = World::active()) {
      world->step();
      if (world->own_store(&value_, &own)) return static_cast<T>(own);
    }
    return value_;
  }

  void store(T value, std::memory_order order = std::memory_order_seq_cst) {
    World* world = World::active();
    if (world == nullptr) {
      value_ = value;
      return;
    }
    world->step();
    if (order == std::memory_order_seq_cst) {
      world->empty_buffer();
      value_ = value;
    } else {
      world->buffer(&value_, value, sizeof(T), order == std::memory_order_release);
    }
  }

  T exchange(T value, std::memory_order = std::memory_order_seq_cst) {
    return change([&](T) { return value; });
  }
  T fetch_add(T value, std::memory_order = std::memory_order_seq_cst) {
    return change([&](T before) { return static_cast<T>(before + value); });
  }
  bool compare_exchange_strong(T& expected, T value,
                               std::memory_order = std::memory_order_seq_cst) {
    const T before = change([&](T now) { return now == expected ? value : now; });
    const bool done = before == expected;
    expected = before;
    return done;
  }

 private:
  template <class Change>
  T change(Change result) {
    if (World* world = World::active()) {
      world->step();
      world->empty_buffer();
    }
    const T before = value_;
    value_ = result(before);
    return before;
  }

  T value_{};
};

/// syscall(SYS_futex, ...) without a limit of time: a lost wake-up is to be seen.
inline long futex(uint32_t* word, int operation, uint32_t value, const timespec*, void*, int) {
  World& world = *World::active();
  world.step();
  world.empty_buffer();  // the kernel's lock
  if (operation == FUTEX_WAIT) {
    if (*word == value) world.wait_on(word);
  } else {
    world.wake_all(word);
  }
  return 0;
}

inline void usleep(unsigned) {
  if (World* world = World::active()) world->step();
}

}  // namespace model
