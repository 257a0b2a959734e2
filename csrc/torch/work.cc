#include "torch/work.h"

#include <ATen/ATen.h>

#include "base/clock.h"
#include "base/log.h"
#include "torch/python_hooks.h"

namespace dpcomm {

c10::intrusive_ptr<TorchWork> TorchWork::launch(Communicator& communicator, Call&& call,
                                                uint64_t sequence) {
  auto work = c10::make_intrusive<TorchWork>(communicator.rank(), std::move(call), sequence);
  std::exception_ptr refused;
  for (const Operation& operation : work->call_.operations()) {
    try {
      work->parts_.push_back(communicator.submit(operation));
    } catch (...) {
      refused = std::current_exception();
      break;
    }
  }
  // Operations complete in order, so the last one given tells of all. If one was refused, those
  // before it still hold the tensors until they are through.
  if (work->parts_.empty()) {
    if (refused) std::rethrow_exception(refused);
    work->complete();
    return work;
  }
  work->parts_.back()->then([work] { work->complete(); });
  if (refused) std::rethrow_exception(refused);
  return work;
}

TorchWork::TorchWork(int rank, Call&& call, uint64_t sequence)
    : c10d::Work(rank, call.type(), call.title(), call.results()),
      call_(std::move(call)),
      sequence_(sequence) {
  parts_.reserve(call_.operations().size());
}

bool TorchWork::wait(std::chrono::milliseconds timeout) {
  constexpr std::chrono::milliseconds kLook(50);  // for signals
  if (generation_ != fork_generation()) {
    throw_translated(usage_error("a forked process cannot wait for a call from before the fork"));
  }
  if (isCompleted()) {
    if (exception_) std::rethrow_exception(exception_);
    return true;
  }
  Communicator::about_to_block();
  const WaitTimer timer(*parts_.back());  // without parts it would be complete
  const bool limited = timeout > kNoTimeout;
  const auto deadline = Clock::now() + timeout;
  const auto complete = [this] { return completed_; };
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    const auto next = Clock::now() + kLook;
    if (cv_.wait_until(lock, limited ? std::min(deadline, next) : next, complete)) break;
    if (limited && Clock::now() >= deadline) {
      throw_translated(timeout_error(call_.title(), " (number ", sequence_,
                                     ") was not complete after ", timeout.count(),
                                     " ms of waiting; it goes on"));
    }
    lock.unlock();
    if (python_hooks().interrupted != nullptr && python_hooks().interrupted()) {
      throw_translated(peer_error("interrupted"));
    }
    lock.lock();
  }
  if (exception_) std::rethrow_exception(exception_);
  return true;
}

std::vector<at::Tensor> TorchWork::result() {
  if (!isCompleted()) throw_translated(usage_error("result() of a call that is not complete"));
  return call_.results();
}

void TorchWork::complete() {
  std::exception_ptr error;
  for (const auto& part : parts_) {
    if (!error) error = part->error();
  }
  if (!error) {
    try {
      call_.finish();
    } catch (...) {
      error = std::current_exception();
    }
  }
  call_.release();
  finish(translated(error));
  complete_future();
}

c10::intrusive_ptr<c10::ivalue::Future> TorchWork::getFuture() {
  bool complete;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!future_) {
      future_ =
          c10::make_intrusive<c10::ivalue::Future>(c10::ListType::create(c10::TensorType::get()));
    }
    complete = completed_;
  }
  if (complete) complete_future();
  return future_;
}

void TorchWork::complete_future() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!future_ || future_complete_) return;
    future_complete_ = true;
  }
  try {
    if (exception_) {
      future_->setError(exception_);
    } else {
      future_->markCompleted(c10::IValue(call_.results()));
    }
  } catch (const std::exception& error) {  // of a callback; nobody is there to catch it
    log_line(LogLevel::kWarn, str("a callback of ", call_.title(), " threw: ", error.what()));
  }
}

}  // namespace dpcomm
