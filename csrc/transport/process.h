// Processes as ranks tell of them to each other through a store.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <string>

namespace dpcomm {

/// The name of this host, at most 63 printable characters.
std::string own_host();

/// Enough of a process to name it, and to see from the same PID namespace whether it is gone.
struct Presence {
  int64_t pid = 0;
  uint64_t pid_namespace = 0;  ///< 0 if that cannot be known
  uint64_t born = 0;           ///< in clock ticks since the host was started; pids repeat
  std::string host;

  /// Of this process.
  static Presence own();
  /// "process <pid> <pid_namespace> <born> <host>".
  std::string text() const;
  /// From text(). Throws InternalError for anything else.
  static Presence parse(const std::string& text);

  /// True if it is known that there is no such process any more, or nothing but its exit status.
  bool gone() const;
};

/// "rank 2 (pid 4711, host node1)".
std::string describe_rank(int rank, int64_t pid, const std::string& host);

}  // namespace dpcomm
