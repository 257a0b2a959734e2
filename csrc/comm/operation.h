// What an operation has to be, before any byte is sent.
#pragma once

#include "comm/communicator.h"

namespace dpcomm {

/// `operation` itself, or `room` with what follows from its counts: blocks that are all of one size
/// are those of an operation without counts, else `count` is the largest.
const Operation& sized(const Operation& operation, int world, Operation& room);

/// Throws UsageError if the operation makes no sense on this rank. For one that is sized().
void check_operation(const Operation& operation, int rank, int world);

/// Throws UsageError for what no kernel runs: gather, scatter, all_to_all, and blocks of unequal
/// size.
void check_on_device(const Operation& operation);

/// Elements that diagnostics tell: of the tensor or a block, or of all blocks where they differ.
size_t told_count(const Operation& operation, int world);

/// A number by which ranks see that they know of the same blocks; 0 where they are of equal size,
/// and for an all_to_all, where no rank knows all of them.
uint32_t blocks_digest(const Operation& operation);

}  // namespace dpcomm
