#include "bind/core_work.h"

#include <algorithm>
#include <iterator>
#include <thread>

#include "base/clock.h"
#include "base/error.h"
#include "bind/core_signals.h"

namespace py = pybind11;

namespace dpcomm {

using std::chrono::milliseconds;

milliseconds milliseconds_of(const std::optional<double>& seconds) {
  if (!seconds) return milliseconds(0);
  if (!(*seconds > 0)) throw usage_error("timeout has to be positive, in seconds");
  return milliseconds(std::max<int64_t>(1, static_cast<int64_t>(*seconds * 1000)));
}

Shared::~Shared() {
  GilRelease release;
  communicator.reset();  // closes it: no operation is in flight any more
}

bool Shared::over(const Flight& flight) const noexcept {
  try {
    return done(flight);
  } catch (const std::exception&) {
    return false;
  }
}

void Shared::sweep() {
  std::list<Flight> ended;     // released last: a buffer's owner may run any code
  uint64_t open = UINT64_MAX;  // a ticket that is not over; nor are those after it
  for (auto flight = flying.begin(); flight != flying.end();) {
    const auto next = std::next(flight);
    if (flight->work != nullptr || flight->ticket < open) {
      if (over(*flight)) {
        ended.splice(ended.end(), flying, flight);
      } else if (flight->work == nullptr) {
        open = flight->ticket;
      }
    }
    flight = next;
  }
}

bool wait_for_ticket(const Communicator& communicator, uint64_t ticket, milliseconds timeout,
                     const std::function<bool()>& interrupted) {
  constexpr std::chrono::microseconds kShortest{20}, kLongest{1000};
  constexpr milliseconds kLook{50};
  const auto begin = Clock::now();
  auto look = begin + kLook;
  auto rest = kShortest;
  while (!communicator.complete(ticket)) {
    const auto now = Clock::now();
    if (timeout.count() > 0 && now - begin > timeout) {
      throw timeout_error("the operation was not complete after ", timeout.count() / 1000.0,
                          " s of waiting; it goes on");
    }
    if (now > look) {
      if (interrupted()) return false;
      look = now + kLook;
    }
    std::this_thread::sleep_for(rest);
    rest = std::min(rest * 2, kLongest);
  }
  if (const std::exception_ptr failure = communicator.failure()) std::rethrow_exception(failure);
  return true;
}

PyWork::~PyWork() {
  if (!shared_->over(flight_)) shared_->flying.push_back(std::move(flight_));
}

bool PyWork::done() {
  if (succeeded_) return true;
  if (!shared_->done(flight_)) return false;
  // A failure that comes later is none of this operation's.
  succeeded_ = !flight_.work && shared_->communicator->failure() == nullptr;
  return true;
}

py::object PyWork::wait(const std::optional<double>& timeout, const py::object& stream) {
  if (flight_.work || timeout) return synchronize(timeout);
  if (succeeded_) return flight_.result;
  if (const std::exception_ptr failure = shared_->communicator->failure()) {
    std::rethrow_exception(failure);
  }
  uintptr_t handle = stream_;
  if (!stream.is_none()) {
    const py::module_ arrays = py::module_::import("dpcomm.device_arrays");
    handle = arrays.attr("stream_handle")(stream).cast<uintptr_t>();
  }
  {
    GilRelease release;
    shared_->communicator->join(flight_.ticket, reinterpret_cast<void*>(handle));
  }
  return flight_.result;
}

py::object PyWork::synchronize(const std::optional<double>& timeout) {
  const milliseconds limit = milliseconds_of(timeout);
  with_signals([&](const auto& interrupted) {
    if (flight_.work) {
      flight_.work->wait(limit, interrupted);
    } else if (!succeeded_) {
      succeeded_ = wait_for_ticket(*shared_->communicator, flight_.ticket, limit, interrupted);
    }
  });
  return flight_.receives ? py::int_(flight_.work->source()) : flight_.result;
}

std::optional<int> PyWork::source() const {
  const int source = flight_.work ? flight_.work->source() : -1;
  return source < 0 ? std::nullopt : std::optional<int>(source);
}

}  // namespace dpcomm
