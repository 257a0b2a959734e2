// The handle of an operation in flight.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <optional>

#include "base/clock.h"
#include "transport/channel.h"

namespace dpcomm {

/// Completed exactly once, by the thread that ran the operation. All members may be called from any
/// thread.
class Work {
 public:
  Work();
  ~Work();
  Work(const Work&) = delete;
  Work& operator=(const Work&) = delete;

  bool done() const;
  /// The error it ended with, or null; null too while it runs. Every caller gets an exception of
  /// its own: one object that several threads throw and release would be shared without need.
  std::exception_ptr error() const;
  /// Returns when it is complete; rethrows its error. A positive `timeout` that runs out gives a
  /// TimeoutError, and the operation goes on; zero waits as long as the operation may take.
  /// `interrupted` is asked about every 50 ms in this thread; where it says true, the wait ends
  /// with false, and the operation goes on. Throws UsageError in a forked child, where nobody would
  /// ever complete it.
  bool wait(std::chrono::milliseconds timeout = std::chrono::milliseconds(0),
            const std::function<bool()>& interrupted = {});
  /// Of a receive that is complete: the rank that sent. Else -1.
  int source() const;
  /// Calls `callback` once when it is complete (at once if it is), in the thread that completes it.
  /// A callback may run, submit and wait for other operations.
  void then(std::function<void()> callback);

  /// For whoever runs the operation.
  void complete(std::optional<Failure> error);
  void set_source(int rank);  ///< before complete()
  /// Adds to `ns` how long wait() takes; before anybody waits.
  void count_waits(std::shared_ptr<std::atomic<uint64_t>> ns);
  /// Somebody waited so long for it in another way than wait().
  void waited(std::chrono::nanoseconds time);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

/// A wait for a work, from here to the end of the scope.
class WaitTimer {
 public:
  explicit WaitTimer(Work& work) : work_(work), since_(Clock::now()) {}
  ~WaitTimer() { work_.waited(Clock::now() - since_); }
  WaitTimer(const WaitTimer&) = delete;
  WaitTimer& operator=(const WaitTimer&) = delete;
  Clock::time_point since() const { return since_; }

 private:
  Work& work_;
  const Clock::time_point since_;
};

}  // namespace dpcomm
