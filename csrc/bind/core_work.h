// Operations of a communicator that Python has started, and their handles.
#pragma once

#include <pybind11/pybind11.h>

#include <chrono>
#include <cstdint>
#include <functional>
#include <list>
#include <memory>
#include <optional>

#include "bind/core_array.h"
#include "comm/communicator.h"

namespace dpcomm {

/// Zero for none. Throws UsageError for what is not positive.
std::chrono::milliseconds milliseconds_of(const std::optional<double>& seconds);

/// An operation and what must live until it is over: one on the CPU has a work, one on a device a
/// ticket.
struct Flight {
  std::shared_ptr<Work> work;
  uint64_t ticket = 0;
  std::unique_ptr<ArrayView> input, output;
  pybind11::object result;
  bool receives = false;  ///< the result is the rank that sent
};

/// What a communicator and its handles share. With the GIL.
struct Shared {
  std::shared_ptr<Communicator> communicator;
  std::list<Flight> flying;  // whose handles have gone, or never were, before they were over

  ~Shared();
  bool done(const Flight& flight) const {
    return flight.work ? flight.work->done() : communicator->complete(flight.ticket);
  }
  /// The same, but false where the device does not answer any more; never throws.
  bool over(const Flight& flight) const noexcept;
  /// Lets go of what is over.
  void sweep();
};

/// Blocks until the operation `ticket`, and all before it, are over; without the GIL. Returns false
/// where `interrupted` said true. Throws TimeoutError where a positive `timeout` runs out, and the
/// communicator's error if it has ended with one.
bool wait_for_ticket(const Communicator& communicator, uint64_t ticket,
                     std::chrono::milliseconds timeout, const std::function<bool()>& interrupted);

/// A handle. One that goes before its operation is over leaves the arrays to the communicator.
class PyWork {
 public:
  /// `stream`: that of the caller, for an operation on a device.
  PyWork(std::shared_ptr<Shared> shared, Flight flight, uintptr_t stream = 0)
      : shared_(std::move(shared)), flight_(std::move(flight)), stream_(stream) {}
  PyWork(const PyWork&) = delete;
  PyWork& operator=(const PyWork&) = delete;
  ~PyWork();

  bool done();
  /// On the CPU, the result is there on return; on a device, it is there for what `stream` (none:
  /// the caller's stream of the operation) gets from now on.
  pybind11::object wait(const std::optional<double>& timeout, const pybind11::object& stream);
  /// The result is there on return.
  pybind11::object synchronize(const std::optional<double>& timeout);
  /// Of a receive that is complete: the rank that sent.
  std::optional<int> source() const;

 private:
  std::shared_ptr<Shared> shared_;
  Flight flight_;
  uintptr_t stream_;
  bool succeeded_ = false;  // on a device: seen complete while there was no failure
};

}  // namespace dpcomm
