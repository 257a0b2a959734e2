// Memory for tensors that the other processes of a host can map, so that collectives read a peer's
// tensor where it lies.
//
// One file without a name (memfd), as long as the machine's memory is large, mapped once and
// sparse: only blocks in use take memory. A peer that knows a HeapHandle and the owner's pid maps
// the same file; from then on every block, those of later too, is an offset in it.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <optional>

namespace dpcomm {

/// With the owner's pid, all that a peer needs to map a heap. id 0: there is no heap.
struct HeapHandle {
  uint64_t id = 0;
  int32_t fd = -1;
  uint64_t bytes = 0;
};

/// The heap of this process, made by the first allocate(). Any thread may call.
///
/// A forked child sees the blocks of its parent where they were, for as long as the parent keeps
/// them: what either writes both read, as with torch's share_memory_(). To the child they are
/// ordinary memory; its own first allocate() makes a heap of its own.
class SharedHeap {
 public:
  /// `bytes` zeros, at a page's start, or a huge page's from 2 MiB on; huge pages where the system
  /// has them for shared memory. All pages are reserved: there is no SIGBUS later. Throws
  /// UsageError, which says what to do, if there is not so much memory or a limit of the process
  /// forbids it, and InternalError if the system cannot do it.
  static void* allocate(size_t bytes);
  /// Gives the memory back to the system at once. In a forked child a parent's block is left
  /// alone. Null is allowed.
  static void free(void* block);
  /// Offset of [data, data + bytes) in the heap; nothing if it does not lie in it, or in a forked
  /// child. Two loads and a comparison.
  static std::optional<uint64_t> offset_of(const void* data, size_t bytes);
  /// True also for what a forked child has of its parents: for who has to know how to free it.
  static bool holds(const void* block);
  /// Where the bytes lie, in the heap of this process. Throws InternalError for a range outside of
  /// it, and where there is no heap.
  static std::byte* at(uint64_t offset, size_t bytes);
  /// The block that `data` lies in is never given out again, also when it is freed: a peer may
  /// still write there, after an operation that failed. Nothing happens if it is no block's.
  static void keep(const void* data);
  static HeapHandle handle();
  /// Of the blocks in use, in whole pages.
  static size_t allocated_bytes();

  /// Where another copy of this library in the process (dpcomm._core, dpcomm._torch) finds the
  /// heap, so that both have the same. share() belongs before the first use.
  static void* registry();
  static void share(void* registry);
};

/// Another process's heap, mapped here. The mapping lives as long as the object, whatever becomes
/// of the owner.
class PeerHeap {
 public:
  /// Throws InternalError if the process is gone, may not be looked into, or has no such heap.
  PeerHeap(pid_t pid, const HeapHandle& handle);
  ~PeerHeap();
  PeerHeap(const PeerHeap&) = delete;
  PeerHeap& operator=(const PeerHeap&) = delete;

  /// Where the bytes lie here. Throws InternalError for a range outside of the heap: the numbers
  /// come from memory that others write.
  std::byte* at(uint64_t offset, size_t bytes) const;

 private:
  std::byte* base_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace dpcomm
