#include "comm/work.h"

#include <algorithm>
#include <condition_variable>
#include <mutex>
#include <vector>

#include "base/clock.h"
#include "base/error.h"
#include "base/fork.h"
#include "comm/communicator.h"

namespace dpcomm {

struct Work::State {
  const uint32_t generation = fork_generation();
  std::mutex mutex;
  std::condition_variable changed;
  bool done = false;
  int source = -1;
  std::optional<Failure> error;
  std::shared_ptr<std::atomic<uint64_t>> waited_ns;  // null: nobody counts
  std::vector<std::function<void()>> callbacks;
};

Work::Work() : state_(std::make_unique<State>()) {}
Work::~Work() {
  // To destroy a condition that a thread of the parent waits on would wait for that thread.
  if (state_->generation != fork_generation()) state_.release();
}

bool Work::done() const {
  if (state_->generation != fork_generation()) return true;  // nobody is left to complete it
  std::lock_guard lock(state_->mutex);
  return state_->done;
}

std::exception_ptr Work::error() const {
  std::lock_guard lock(state_->mutex);
  if (!state_->error) return nullptr;
  return std::make_exception_ptr(Error(state_->error->kind, state_->error->message));
}

bool Work::wait(std::chrono::milliseconds timeout, const std::function<bool()>& interrupted) {
  constexpr std::chrono::milliseconds kLook{50};
  if (state_->generation != fork_generation()) {
    throw usage_error("a forked process cannot wait for an operation that began before the fork");
  }
  const bool limited = timeout.count() > 0;
  if (this->done()) {  // nobody waits
    if (const auto failure = error()) std::rethrow_exception(failure);
    return true;
  }
  Communicator::about_to_block();
  const WaitTimer timer(*this);
  const auto deadline = timer.since() + timeout;
  std::unique_lock lock(state_->mutex);
  const auto done = [this] { return state_->done; };
  while (!state_->done) {
    const auto next = Clock::now() + kLook;
    if (limited && Clock::now() > deadline) {
      throw timeout_error("the operation was not complete after ", timeout.count() / 1000.0,
                          " s of waiting; it goes on");
    }
    if (!interrupted && !limited) {
      state_->changed.wait(lock, done);
    } else if (!state_->changed.wait_until(lock, limited ? std::min(deadline, next) : next, done) &&
               interrupted) {
      lock.unlock();
      if (interrupted()) return false;
      lock.lock();
    }
  }
  if (state_->error) throw Error(state_->error->kind, state_->error->message);
  return true;
}

void Work::count_waits(std::shared_ptr<std::atomic<uint64_t>> ns) {
  state_->waited_ns = std::move(ns);
}

void Work::waited(std::chrono::nanoseconds time) {
  if (state_->waited_ns) state_->waited_ns->fetch_add(static_cast<uint64_t>(time.count()));
}

void Work::then(std::function<void()> callback) {
  {
    std::lock_guard lock(state_->mutex);
    if (!state_->done) {
      state_->callbacks.push_back(std::move(callback));
      return;
    }
  }
  callback();
}

int Work::source() const {
  std::lock_guard lock(state_->mutex);
  return state_->done ? state_->source : -1;
}

void Work::set_source(int rank) {
  std::lock_guard lock(state_->mutex);
  state_->source = rank;
}

void Work::complete(std::optional<Failure> error) {
  std::vector<std::function<void()>> callbacks;
  {
    std::lock_guard lock(state_->mutex);
    state_->done = true;
    state_->error = std::move(error);
    callbacks.swap(state_->callbacks);
    state_->changed.notify_all();
  }
  for (const auto& callback : callbacks) callback();
}

}  // namespace dpcomm
