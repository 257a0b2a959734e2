// Reading the memory of another process of this host.
#pragma once

#include <cstddef>
#include <cstdint>

namespace dpcomm {

/// Lets processes of this user read this one's memory where Yama asks for that (ptrace_scope 1).
void allow_reading();

/// False if DPCOMM_SINGLE_COPY says off. Throws UsageError for a value that makes no sense.
bool reading_wanted();

/// DPCOMM_SINGLE_COPY_BYTES; SIZE_MAX where it is empty.
size_t single_copy_wanted();

/// Copies `bytes` at `address` of process `pid` to `to`. False if that is not possible: forbidden,
/// the process is gone, or nothing lies there; `to` may then be written in part.
bool read_memory(uint32_t pid, uint64_t address, void* to, size_t bytes);

/// True if this process may call read_memory() on itself (a seccomp filter may forbid it).
bool can_read_own();

}  // namespace dpcomm
