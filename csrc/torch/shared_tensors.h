// Tensors in memory that the processes of a host share (cpu/shared_heap.h).
#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>

namespace dpcomm {

/// Smaller blocks stay where they are: their way through the library is another.
constexpr size_t kSharedBlockBytes = size_t{1} << 20;

/// From now on blocks of at least kSharedBlockBytes that this thread takes from torch's allocator
/// for the CPU lie in shared memory, or no longer. Everything else goes to the allocator that was
/// there, and so do those blocks where shared memory cannot be had: the first time a line on stderr
/// says so. Returns what was set before.
bool set_thread_shared_memory(bool on);

/// A tensor of zeros in shared memory, of any size; stays there if it is resized. Throws Error as
/// SharedHeap::allocate() does.
at::Tensor shared_empty(at::IntArrayRef size, at::ScalarType dtype);

}  // namespace dpcomm
