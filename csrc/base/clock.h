// Time as the library counts it.
#pragma once

#include <chrono>
#include <cstdint>

namespace dpcomm {

using Clock = std::chrono::steady_clock;

/// The same count in all processes of a host.
inline int64_t to_ns(Clock::time_point time) {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(time.time_since_epoch()).count();
}

inline int64_t now_ns() { return to_ns(Clock::now()); }

}  // namespace dpcomm
