// Waiting: spin, yield, sleep.
#pragma once

#include <chrono>
#include <cstdint>

#include "base/clock.h"
#include "transport/channel.h"

namespace dpcomm {

/// Lets the other thread of a core go on for a moment.
inline void cpu_pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

/// How long each stage of a wait lasts before the next one begins.
struct WaitPolicy {
  int64_t spin_ns = 0;
  int64_t yield_ns = 0;

  /// By the cores that this process may use, the ranks on this host and the DPCOMM_SPIN_US and
  /// DPCOMM_YIELD_US variables: with more ranks than cores spinning only keeps the peer from
  /// running.
  static WaitPolicy choose(int local_ranks);
  /// For an operation that nobody waits for yet: it sleeps at once, since what it burns is the
  /// backward pass's.
  static WaitPolicy choose_patient();
};

/// One wait of one rank. pause() is called whenever a look at the channels found nothing to do; it
/// returns when it is time to look again. Not thread-safe.
class Waiter {
 public:
  Waiter(Transport& transport, const WaitPolicy& policy, Port port = Port::kCollectives)
      : transport_(transport), policy_(policy), port_(port) {}
  ~Waiter() { progressed(); }
  static constexpr std::chrono::milliseconds kCheck{50};

  /// From the next pause on.
  void use(const WaitPolicy& policy) { policy_ = policy; }
  Waiter(const Waiter&) = delete;
  Waiter& operator=(const Waiter&) = delete;

  /// True if the caller should ask why it waits: a rank has failed, or the wait has come to
  /// sleeping and nobody asked for 50 ms. Sleeps for `longest` at most.
  bool pause(std::chrono::nanoseconds longest = kCheck);

  /// There was something to do: the next wait starts afresh.
  void progressed();

  /// Nanoseconds spent in waits that are over.
  int64_t waited_ns() const { return waited_ns_; }

 private:
  Transport& transport_;
  WaitPolicy policy_;
  const Port port_;
  int64_t began_ns_ = 0;  // of this wait; 0: not waiting
  int64_t stage_ns_ = 0;  // when the stages last began
  int64_t checked_ns_ = 0;
  int64_t waited_ns_ = 0;
  uint32_t ticket_ = 0;
  bool armed_ = false;
};

}  // namespace dpcomm
