// One line to stderr for what a user may want to know (DPCOMM_DEBUG).
#pragma once

#include <string>

namespace dpcomm {

enum class LogLevel { kOff, kWarn, kInfo, kTrace };

/// True if DPCOMM_DEBUG asks for this level.
bool log_enabled(LogLevel level);

/// Writes "dpcomm: <text>" as one line.
void log_line(LogLevel level, const std::string& text);

}  // namespace dpcomm
