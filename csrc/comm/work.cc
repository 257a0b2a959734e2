#include "comm/work.h"

#include <condition_variable>
#include <mutex>
#include <vector>

#include "base/error.h"
#include "comm/communicator.h"

namespace dpcomm {

struct Work::State {
  std::mutex mutex;
  std::condition_variable changed;
  bool done = false;
  std::exception_ptr error;
  std::vector<std::function<void()>> callbacks;
};

Work::Work() : state_(std::make_unique<State>()) {}
Work::~Work() = default;

bool Work::done() const {
  std::lock_guard lock(state_->mutex);
  return state_->done;
}

std::exception_ptr Work::error() const {
  std::lock_guard lock(state_->mutex);
  return state_->error;
}

void Work::wait(std::chrono::milliseconds timeout) {
  std::unique_lock lock(state_->mutex);
  const auto done = [this] { return state_->done; };
  if (!done()) {
    lock.unlock();
    Communicator::about_to_block();
    lock.lock();
  }
  if (timeout.count() <= 0) {
    state_->changed.wait(lock, done);
  } else if (!state_->changed.wait_for(lock, timeout, done)) {
    throw timeout_error("the operation was not complete after ", timeout.count() / 1000.0,
                        " s of waiting; it goes on");
  }
  if (state_->error) std::rethrow_exception(state_->error);
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

void Work::complete(std::exception_ptr error) {
  std::vector<std::function<void()>> callbacks;
  {
    std::lock_guard lock(state_->mutex);
    state_->done = true;
    state_->error = error;
    callbacks.swap(state_->callbacks);
    state_->changed.notify_all();
  }
  for (const auto& callback : callbacks) callback();
}

}  // namespace dpcomm
