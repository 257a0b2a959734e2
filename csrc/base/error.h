// The three kinds of error that a caller can see (docs/errors.md).
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace dpcomm {

enum class ErrorKind {
  kUsage,     ///< the caller's fault; raised before any byte is sent where that can be known
  kPeer,      ///< a peer died or gave up; recoverable by a new communicator
  kTimeout,   ///< a peer did not come in time; recoverable by a new communicator
  kInternal,  ///< a bug in dpcomm or a fault of the system
};

class __attribute__((visibility("default"))) Error : public std::runtime_error {
 public:
  Error(ErrorKind kind, const std::string& message) : std::runtime_error(message), kind_(kind) {}
  ErrorKind kind() const { return kind_; }

 private:
  ErrorKind kind_;
};

/// Joins its arguments with operator<<.
template <class... Parts>
std::string str(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

template <class... Parts>
Error usage_error(const Parts&... parts) {
  return Error(ErrorKind::kUsage, str(parts...));
}
template <class... Parts>
Error peer_error(const Parts&... parts) {
  return Error(ErrorKind::kPeer, str(parts...));
}
template <class... Parts>
Error timeout_error(const Parts&... parts) {
  return Error(ErrorKind::kTimeout, str(parts...));
}
template <class... Parts>
Error internal_error(const Parts&... parts) {
  return Error(ErrorKind::kInternal, str(parts...));
}

}  // namespace dpcomm
