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

/// Since `ns`, a number of now_ns() or, in memory that others write to, any number.
inline int64_t elapsed_ns(int64_t ns) {
  return static_cast<int64_t>(static_cast<uint64_t>(now_ns()) - static_cast<uint64_t>(ns));
}

}  // namespace dpcomm
