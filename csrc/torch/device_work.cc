#include "torch/device_work.h"

#include <c10/core/DeviceGuard.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>
#include <thread>

#include "base/clock.h"
#include "torch/python_hooks.h"

namespace dpcomm {
namespace {

c10::Stream current_stream(c10::Device device) {
  return c10::impl::VirtualGuardImpl(device.type()).getStream(device);
}

}  // namespace

DeviceEnd DeviceEnd::launch(Communicator& communicator, const c10::Stream& stream, Call& call) {
  DeviceEnd end(stream);
  const c10::DeviceGuard device(stream.device());
  void* const caller = current_stream(stream.device()).native_handle();
  try {
    for (const Operation& operation : call.operations()) {
      end.ticket_ = communicator.enqueue(operation, caller);
    }
    if (call.has_copies()) {
      const c10::StreamGuard guard(stream);
      call.finish();
      end.copied_.emplace(stream.device_type());
      end.copied_->record(stream);
    }
  } catch (...) {
    if (end.ticket_ != 0) communicator.join(end.ticket_, caller);
    throw;
  }
  return end;
}

void DeviceEnd::join(Communicator& communicator) const {
  if (ticket_ == 0) return;
  const c10::DeviceGuard device(stream_.device());
  const c10::Stream current = current_stream(stream_.device());
  communicator.join(ticket_, current.native_handle());
  if (copied_) copied_->block(current);
}

bool DeviceEnd::complete(const Communicator& communicator) const {
  return ticket_ == 0 || (communicator.complete(ticket_) && (!copied_ || copied_->query()));
}

c10::intrusive_ptr<DeviceWork> DeviceWork::launch(std::shared_ptr<Communicator> communicator,
                                                  const c10::Stream& stream, Call&& call,
                                                  uint64_t sequence) {
  DeviceEnd end = DeviceEnd::launch(*communicator, stream, call);
  call.record_on(stream);
  auto work =
      c10::make_intrusive<DeviceWork>(std::move(communicator), std::move(end), call, sequence);
  work->future_ = c10::make_intrusive<c10::ivalue::Future>(
      c10::ListType::create(c10::TensorType::get()), std::vector<c10::Device>{stream.device()});
  const c10::StreamGuard guard(stream);
  work->future_->markCompleted(c10::IValue(call.results()));
  return work;
}

DeviceWork::DeviceWork(std::shared_ptr<Communicator> communicator, DeviceEnd&& end,
                       const Call& call, uint64_t sequence)
    : c10d::Work(communicator->rank(), call.type()),
      communicator_(std::move(communicator)),
      end_(std::move(end)),
      title_(call.title()),
      results_(call.results()),
      sequence_(sequence) {}

void DeviceWork::check_owner() const {
  if (generation_ == fork_generation()) return;
  throw_translated(usage_error("a forked process cannot wait for a call from before the fork"));
}

bool DeviceWork::isCompleted() {
  check_owner();
  if (succeeded_) return true;
  // First whether it is complete: a failure that came later is none of this call's.
  if (!end_.complete(*communicator_)) return false;
  if (communicator_->failure() == nullptr) succeeded_ = true;
  return true;
}

std::exception_ptr DeviceWork::exception() const {
  return succeeded_ ? nullptr : translated(communicator_->failure());
}

bool DeviceWork::isSuccess() const { return exception() == nullptr; }

void DeviceWork::synchronize() {
  check_owner();
  if (succeeded_) return;
  try {
    end_.join(*communicator_);
  } catch (const Error& error) {
    throw_translated(error);
  }
}

bool DeviceWork::wait(std::chrono::milliseconds timeout) {
  synchronize();
  if (timeout > kNoTimeout) wait_on_host(timeout);
  // A query would end a capture of the current stream: only where something is wrong.
  if (const std::exception_ptr error = exception()) std::rethrow_exception(error);
  return true;
}

void DeviceWork::wait_on_host(std::chrono::milliseconds timeout) {
  constexpr std::chrono::milliseconds kLook(50);  // for signals
  const auto deadline = Clock::now() + timeout;
  auto look = Clock::now() + kLook;
  std::chrono::microseconds pause(20);
  if (!isCompleted()) Communicator::about_to_block();
  while (!isCompleted() && communicator_->failure() == nullptr) {
    const auto now = Clock::now();
    if (now >= deadline) {
      throw_translated(timeout_error(title_, " (number ", sequence_, ") was not complete after ",
                                     timeout.count(), " ms of waiting; it goes on"));
    }
    if (now >= look) {
      look = now + kLook;
      if (python_hooks().interrupted != nullptr && python_hooks().interrupted()) {
        throw_translated(peer_error("interrupted"));
      }
    }
    std::this_thread::sleep_for(pause);
    pause = std::min(pause * 2, std::chrono::microseconds(1000));
  }
}

}  // namespace dpcomm
