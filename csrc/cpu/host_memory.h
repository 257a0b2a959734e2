// How much memory this host would still give.
#pragma once

#include <cstddef>
#include <string>

namespace dpcomm {

/// Bytes that could be had without killing anything: what the kernel calls available, and what the
/// control groups (version 1 or 2) of this process leave, whichever is less; the largest number if
/// nothing tells. An estimate, old at once; reads files of /proc and /sys, some 50 µs. `root` is
/// put before their names, for tests.
size_t available_memory(const std::string& root = "");

}  // namespace dpcomm
