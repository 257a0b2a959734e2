// Forked processes, such as the workers of a DataLoader.
#pragma once

#include <cstdint>

namespace dpcomm {

/// Counts the forks that lead from the first process that asked to this one. What belongs to one
/// process notes the number when it is made, and is not this process's where it differs: its
/// threads do not exist here, its locks may be taken for ever, its memory is the parent's. Starts
/// no thread, takes no lock.
uint32_t fork_generation();

}  // namespace dpcomm
