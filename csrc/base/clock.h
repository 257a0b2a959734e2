// Time as the library counts it.
#pragma once

#include <chrono>
#include <cstdint>

namespace dpcomm {

using Clock = std::chrono::steady_clock;

inline int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now().time_since_epoch())
      .count();
}

}  // namespace dpcomm
