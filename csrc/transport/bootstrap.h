// How ranks find each other: a key-value store that somebody else keeps (torch's, a file, TCP).
#pragma once

#include <chrono>
#include <string>

namespace dpcomm {

class Bootstrap {
 public:
  virtual ~Bootstrap() = default;
  virtual void set(const std::string& key, const std::string& value) = 0;
  /// The value of `key`; waits for it at most `timeout`, then returns false.
  virtual bool get(const std::string& key, std::chrono::milliseconds timeout,
                   std::string& value) = 0;
  /// Called now and then while a start waits; may throw to end it (Ctrl-C).
  virtual void look() {}
};

}  // namespace dpcomm
