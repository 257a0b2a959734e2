// The memory that emulated kernels may touch: named regions, each with an owner, so that accesses
// outside of them are found, flags have names in reports, and traffic can be counted by kind.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace dpcomm::emulated {

/// What a region is for; traffic is counted by it.
enum class MemoryClass : uint8_t { kTensor, kStaging, kState, kHost };
inline constexpr int kMemoryClasses = 4;

struct Region {
  const char* base = nullptr;
  size_t bytes = 0;
  std::string name;  ///< "staging of rank 1"
  MemoryClass kind = MemoryClass::kTensor;
  int owner = 0;            ///< rank
  bool abort_word = false;  ///< a block that saw it differ from 0 may publish nothing more
  /// Names the flag or packet at an offset, with what `value` says of it: "arrival of 0->1, lane 0,
  /// cta 2, slot 1: message 5". May be empty.
  std::function<std::string(size_t offset, uint64_t value)> describe;

  bool holds(const void* place, size_t size) const {
    const char* at = static_cast<const char*>(place);
    return at >= base && size <= bytes && at - base <= static_cast<ptrdiff_t>(bytes - size);
  }
};

/// A set of regions that do not overlap. One thread at a time.
class MemoryMap {
 public:
  void add(Region region);
  /// Forgets the region that starts at `base`.
  void remove(const void* base);
  /// The region that holds all of [place, place + size), or null.
  const Region* find(const void* place, size_t size) const;
  /// "arrival of ..." where the region knows, else "<region> + <offset>", else the bare address.
  std::string describe(const void* place, uint64_t value) const;

 private:
  std::vector<Region> regions_;  // by base
  static constexpr size_t kCached = 256;
  struct Cached {
    uintptr_t page = 0;
    size_t index = 0;
  };
  mutable Cached cache_[kCached];
};

/// Traffic to memory of one kind.
struct AccessCounts {
  uint64_t read_bytes = 0;
  uint64_t written_bytes = 0;
  uint64_t wide_reads = 0;  ///< accesses of 16 bytes
  uint64_t wide_writes = 0;
  uint64_t small_reads = 0;  ///< accesses of fewer bytes
  uint64_t small_writes = 0;
};

/// What the threads of one rank did.
struct RankCounts {
  AccessCounts data[kMemoryClasses][2];  ///< [kind][1 if another rank owns it]; no flags, packets
  uint64_t fences = 0;
  uint64_t acquires = 0;
  uint64_t polls = 0;  ///< relaxed loads of flags
  uint64_t flag_stores = 0;
  uint64_t packet_stores = 0;
  uint64_t packet_polls = 0;
};

}  // namespace dpcomm::emulated
