#include "base/log.h"

#include <unistd.h>

#include "base/env.h"

namespace dpcomm {
namespace {

LogLevel wanted_level() {
  const std::string value = environment(Variable::DEBUG);
  if (value == "OFF") return LogLevel::kOff;
  if (value == "INFO") return LogLevel::kInfo;
  if (value == "TRACE") return LogLevel::kTrace;
  return LogLevel::kWarn;
}

}  // namespace

bool log_enabled(LogLevel level) {
  static const LogLevel wanted = wanted_level();
  return level <= wanted;
}

void log_line(LogLevel level, const std::string& text) {
  if (!log_enabled(level)) return;
  const std::string line = "dpcomm: " + text + "\n";
  // One write, so that lines of several ranks do not mix.
  [[maybe_unused]] const auto written = ::write(STDERR_FILENO, line.data(), line.size());
}

}  // namespace dpcomm
