// Which operations a stream still has to do, by events.
#pragma once

#include <cstdint>
#include <deque>
#include <mutex>
#include <vector>

#include "cuda/engine.h"
#include "cuda/runtime.h"

namespace dpcomm {

/// An operation on its way.
struct Ticket {
  uint64_t number = 0;
  cudaEvent_t ready =
      nullptr;  ///< behind what the caller's stream did before; null: its own stream
  cudaEvent_t done = nullptr;
  uint64_t capture = 0;  ///< not 0: part of the graph that this capture makes
};

/// Members may be called from any thread. With the stream's device current.
class Tickets {
 public:
  ~Tickets();

  /// An event without timing.
  cudaEvent_t event();
  void give_back(cudaEvent_t event);

  /// The next number; tickets are added in the order of their numbers.
  uint64_t next() { return last_ + 1; }
  void add(const Ticket& ticket);
  /// The stream has an operation whose end cannot be seen: from now on nothing is known of any.
  void lose();

  /// Throws InternalError where the device has failed, or an operation was lost.
  Progress progress(uint64_t number);
  /// Lets `caller` wait for the operation.
  void join(uint64_t number, cudaStream_t caller);
  uint64_t last();
  /// True if an operation has ever become part of a graph.
  bool captured_any();

 private:
  void retire();
  void recycle(const Ticket& ticket);

  std::mutex mutex_;
  std::vector<cudaEvent_t> free_;
  std::deque<Ticket> pending_;    // not known to be complete, by number
  std::vector<Ticket> captured_;  // of the last capture; only it may wait for them
  uint64_t last_ = 0;
  bool captured_any_ = false;
  bool lost_ = false;
};

}  // namespace dpcomm
