// What a group knows of its calls as a whole: how many are on their way, how long each took, and
// whom to tell when one is complete.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <torch/csrc/distributed/c10d/Work.hpp>

#include "base/clock.h"

namespace dpcomm {

/// Of calls on the CPU. Shared by a group and its works, which may outlive it. All members may be
/// called from any thread.
class Completions {
 public:
  using Hook = std::function<void(std::shared_ptr<c10d::WorkInfo>)>;
  using Began = Clock::time_point;

  /// A call that its own thread runs to its end, from here to the end of the scope. Costs two
  /// atomic additions where nobody asks for times: no hook is set, and no other call is on its way.
  class Here {
   public:
    explicit Here(Completions& all);
    ~Here();
    Here(const Here&) = delete;
    Here& operator=(const Here&) = delete;
    /// The call is complete: calls the hook, in this thread.
    void succeeded(c10d::OpType type, uint64_t sequence);

   private:
    Completions& all_;
    const Began began_;  // of a call that a hook will hear of
  };

  /// Another call begins; end() or drop() is to follow.
  Began begin();
  /// How long a call that is complete now was active; one that has its place in the order of
  /// collectives (`in_order`) was not before the last one ended.
  std::chrono::duration<float> measure(Began began, bool in_order);
  /// The call is complete: calls the hook, unless it failed, in this thread.
  void end(c10d::OpType type, uint64_t sequence, Began began, std::chrono::duration<float> active,
           bool failed);
  /// The call did not happen.
  void drop();

  /// Throws UsageError if there is one already.
  void set_hook(std::shared_ptr<const Hook> hook);
  bool has_hook() const;
  /// Waits until no call is on its way and the hook has been called for all. `interrupted` is asked
  /// about every 50 ms; where it says true, the wait ends with false.
  bool wait(bool (*interrupted)());

 private:
  void tell(c10d::OpType type, uint64_t sequence, Began began, std::chrono::duration<float> active);

  std::atomic<size_t> here_{0};          // calls that their own threads run
  std::atomic<size_t> on_their_way_{0};  // all others; written under mutex_
  std::atomic<size_t> waiters_{0};       // threads in wait()
  std::atomic<bool> hooked_{false};      // hook_ is there
  std::mutex mutex_;                     // what follows
  std::condition_variable changed_;
  Clock::time_point last_end_{};
  std::shared_ptr<const Hook> hook_;
};

}  // namespace dpcomm
