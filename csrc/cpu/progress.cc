#include "cpu/progress.h"

#include <sched.h>

#include <algorithm>

#include "base/env.h"

namespace dpcomm {
namespace {

constexpr int64_t kCheckNs = std::chrono::nanoseconds(Waiter::kCheck).count();
constexpr int kPausesPerLook = 8;

int usable_cores() {
  cpu_set_t cores;
  return sched_getaffinity(0, sizeof(cores), &cores) == 0 ? std::max(1, CPU_COUNT(&cores)) : 1;
}

}  // namespace

WaitPolicy WaitPolicy::choose(int local_ranks) {
  const bool crowded = local_ranks > usable_cores();
  const double spin_us = environment_number(Variable::SPIN_US, crowded ? 0 : 0.5);
  const double yield_us = environment_number(Variable::YIELD_US, 60);
  return WaitPolicy{static_cast<int64_t>(spin_us * 1e3), static_cast<int64_t>(yield_us * 1e3)};
}

WaitPolicy WaitPolicy::choose_patient() {
  const double spin_us = environment_number(Variable::SPIN_US, 0);
  const double yield_us = environment_number(Variable::YIELD_US, 0);
  return WaitPolicy{static_cast<int64_t>(spin_us * 1e3), static_cast<int64_t>(yield_us * 1e3)};
}

bool Waiter::pause(std::chrono::nanoseconds longest) {
  if (armed_) {  // looked once more after arm(), and there was still nothing
    transport_.sleep(port_, ticket_, longest);
    armed_ = false;
    stage_ns_ = now_ns();
    if (transport_.failed()) return true;
    if (stage_ns_ - checked_ns_ < kCheckNs) return false;
    checked_ns_ = stage_ns_;
    return true;
  }
  const int64_t now = now_ns();
  if (began_ns_ == 0) began_ns_ = stage_ns_ = checked_ns_ = now;
  const int64_t elapsed = now - stage_ns_;
  if (elapsed < policy_.spin_ns) {
    for (int i = 0; i < kPausesPerLook; ++i) cpu_pause();
    return false;
  }
  if (elapsed < policy_.spin_ns + policy_.yield_ns) {
    sched_yield();
  } else {
    ticket_ = transport_.arm(port_);
    armed_ = true;
  }
  return transport_.failed();
}

void Waiter::progressed() {
  if (armed_) transport_.disarm(port_);
  armed_ = false;
  if (began_ns_ != 0) waited_ns_ += now_ns() - began_ns_;
  began_ns_ = 0;
}

}  // namespace dpcomm
