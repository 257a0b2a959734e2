#include "torch/work.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <atomic>

#include "base/clock.h"
#include "base/log.h"
#include "torch/python_hooks.h"

namespace dpcomm {

c10::intrusive_ptr<TorchWork> TorchWork::launch(Communicator& communicator,
                                                std::shared_ptr<Completions> completions,
                                                Call&& call, uint64_t sequence) {
  auto work = c10::make_intrusive<TorchWork>(communicator.rank(), std::move(completions),
                                             std::move(call), sequence);
  work->began_ = work->completions_->begin();
  std::exception_ptr refused;
  try {
    work->submit(communicator);
  } catch (...) {
    refused = std::current_exception();
  }
  // Operations complete in order, so the last one given tells of all. If one was refused, those
  // before it still hold the tensors until they are through.
  if (!work->parts_.empty()) {
    work->parts_.back()->then([work] { work->complete(); });
  } else if (refused) {
    work->completions_->drop();
  } else {
    work->complete();
  }
  if (refused) std::rethrow_exception(refused);
  return work;
}

void TorchWork::submit(Communicator& communicator) {
  for (const Operation& operation : call_.operations()) {
    parts_.push_back(communicator.submit(operation));
  }
  if (!call_.message()) return;
  const Call::Message& message = *call_.message();
  parts_.push_back(message.is_send ? communicator.send(message.peer, message.tag, message.data,
                                                       message.bytes, call_.timeout())
                                   : communicator.recv(message.peer, message.tag, message.data,
                                                       message.bytes, call_.timeout()));
}

TorchWork::TorchWork(int rank, std::shared_ptr<Completions> completions, Call&& call,
                     uint64_t sequence)
    : c10d::Work(rank, call.type(), call.title(), call.results()),
      call_(std::move(call)),
      sequence_(sequence),
      completions_(std::move(completions)) {
  parts_.reserve(call_.operations().size() + 1);
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
  const bool in_order = !call_.message();
  duration_ = completions_->measure(began_, in_order);
  finish(translated(error));
  complete_future();
  completions_->end(opType_, sequence_, began_, duration_, /*failed=*/error != nullptr);
}

int TorchWork::sourceRank() const {
  const auto& message = call_.message();
  if (!message || message->is_send || parts_.empty()) return -1;
  return message->peer == Communicator::kAnySource ? parts_[0]->source() : message->peer;
}

float TorchWork::getDuration() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!completed_) throw_translated(usage_error("the duration of a call that is not complete"));
  return std::chrono::duration<float, std::milli>(duration_).count();
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

bool CoalescedWork::isCompleted() {
  return std::all_of(works_.begin(), works_.end(),
                     [](const auto& work) { return work->isCompleted(); });
}

std::exception_ptr CoalescedWork::exception() const {
  for (const auto& work : works_) {
    if (const std::exception_ptr error = work->exception()) return error;
  }
  return nullptr;
}

bool CoalescedWork::wait(std::chrono::milliseconds timeout) {
  const bool limited = timeout > kNoTimeout;
  const auto deadline = Clock::now() + timeout;
  for (const auto& work : works_) {
    const auto left =
        std::chrono::duration_cast<std::chrono::milliseconds>(deadline - Clock::now());
    work->wait(limited ? std::max(left, std::chrono::milliseconds(1)) : kNoTimeout);
  }
  return true;
}

void CoalescedWork::synchronize() {
  for (const auto& work : works_) work->synchronize();
}

std::vector<at::Tensor> CoalescedWork::result() {
  std::vector<at::Tensor> all;
  for (const auto& work : works_) {
    const std::vector<at::Tensor> part = work->result();
    all.insert(all.end(), part.begin(), part.end());
  }
  return all;
}

c10::intrusive_ptr<c10::ivalue::Future> CoalescedWork::getFuture() {
  std::vector<c10::Device> devices;
  for (const auto& work : works_) {
    for (const c10::Device& device : work->getFuture()->devices()) {
      if (std::find(devices.begin(), devices.end(), device) == devices.end()) {
        devices.push_back(device);
      }
    }
  }
  auto all = c10::make_intrusive<c10::ivalue::Future>(c10::ListType::create(c10::TensorType::get()),
                                                      devices);
  if (works_.empty()) {
    all->markCompleted(c10::IValue(std::vector<at::Tensor>()));
    return all;
  }
  auto left = std::make_shared<std::atomic<size_t>>(works_.size());
  for (const auto& work : works_) {
    work->getFuture()->addCallback([all, left, works = works_](c10::ivalue::Future& part) {
      if (part.hasError()) all->setErrorIfNeeded(part.exception_ptr());
      if (left->fetch_sub(1) != 1 || all->completed()) return;
      std::vector<at::Tensor> tensors;
      for (const auto& each : works) {
        for (const at::Tensor& tensor : each->result()) tensors.push_back(tensor);
      }
      all->markCompleted(c10::IValue(std::move(tensors)));
    });
  }
  return all;
}

Completions::Here::Here(Completions& all)
    : all_(all), began_(all.has_hook() ? Clock::now() : Began()) {
  all_.here_.fetch_add(1);
}

Completions::Here::~Here() {
  if (all_.here_.fetch_sub(1) != 1 || all_.waiters_.load() == 0) return;
  const std::lock_guard<std::mutex> lock(all_.mutex_);
  all_.changed_.notify_all();
}

void Completions::Here::succeeded(c10d::OpType type, uint64_t sequence) {
  // A call that begins from now on begins after this one has ended.
  if (!all_.has_hook() && all_.on_their_way_.load() == 0) return;
  const Began began = began_ == Began() ? Clock::now() : began_;
  const auto active = all_.measure(began, /*in_order=*/true);
  all_.tell(type, sequence, began, active);
}

Completions::Began Completions::begin() {
  const std::lock_guard<std::mutex> lock(mutex_);
  ++on_their_way_;
  return Clock::now();
}

std::chrono::duration<float> Completions::measure(Began began, bool in_order) {
  const auto now = Clock::now();
  const std::lock_guard<std::mutex> lock(mutex_);
  if (in_order) {
    began = std::max(began, last_end_);
    last_end_ = now;
  }
  return now - began;
}

void Completions::end(c10d::OpType type, uint64_t sequence, Began began,
                      std::chrono::duration<float> active, bool failed) {
  if (!failed) tell(type, sequence, began, active);
  drop();
}

void Completions::tell(c10d::OpType type, uint64_t sequence, Began began,
                       std::chrono::duration<float> active) {
  if (!has_hook()) return;
  std::shared_ptr<const Hook> hook;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    hook = hook_;
  }
  try {
    (*hook)(std::make_shared<c10d::WorkInfo>(type, sequence, began, Clock::now(), active));
  } catch (const std::exception& error) {  // nobody is there to catch it
    log_line(LogLevel::kWarn, str("a completion hook threw: ", error.what()));
  }
}

void Completions::drop() {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (--on_their_way_ == 0) changed_.notify_all();
}

void Completions::set_hook(std::shared_ptr<const Hook> hook) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (hook_ != nullptr) throw usage_error("the group has a completion hook already");
  hook_ = std::move(hook);
  hooked_.store(true);
}

bool Completions::has_hook() const { return hooked_.load(); }

bool Completions::wait(bool (*interrupted)()) {
  constexpr std::chrono::milliseconds kLook(50);  // for signals
  const auto done = [this] { return on_their_way_.load() == 0 && here_.load() == 0; };
  waiters_.fetch_add(1);  // before the first look: whoever leaves after it tells
  std::unique_lock<std::mutex> lock(mutex_);
  bool stopped = false;
  while (!stopped && !changed_.wait_for(lock, kLook, done)) {
    lock.unlock();
    stopped = interrupted != nullptr && interrupted();
    lock.lock();
  }
  waiters_.fetch_sub(1);
  return !stopped;
}

}  // namespace dpcomm
