// Memory of emulated devices: blocks with guard zones between them.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "memory.h"

namespace dpcomm::emulated {

class Arena {
 public:
  explicit Arena(size_t bytes) : bytes_(bytes) {
    void* pages = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (pages == MAP_FAILED) throw std::bad_alloc();
    base_ = static_cast<char*>(pages);
    std::memset(base_, kGuard, kGuardBytes);
    used_ = kGuardBytes;
  }
  ~Arena() { munmap(base_, bytes_); }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  /// region.bytes bytes filled with `fill`, `offset` bytes behind a multiple of 256, also known to
  /// map(). At least one byte.
  char* allocate(Region region, int fill, size_t offset = 0) {
    if (region.bytes == 0) region.bytes = 1;
    const size_t first = (used_ + 255) / 256 * 256 + offset;
    const size_t end = first + region.bytes;
    if (end + kGuardBytes > bytes_) throw std::runtime_error("the arena is full");
    std::memset(base_ + used_, kGuard, first - used_);
    std::memset(base_ + first, fill, region.bytes);
    std::memset(base_ + end, kGuard, kGuardBytes);
    used_ = end + kGuardBytes;
    guards_.push_back(Guard{first, end, region.name});
    region.base = base_ + first;
    char* place = base_ + first;
    map_.add(std::move(region));
    return place;
  }

  MemoryMap& map() { return map_; }

  /// The name of a block whose guard zones were written to; empty if there is none.
  std::string damaged() const {
    for (const Guard& guard : guards_) {
      for (size_t i = 1; i <= kGuardBytes; ++i) {
        if (base_[guard.first - i] != kGuard || base_[guard.end + i - 1] != kGuard) {
          return guard.name;
        }
      }
    }
    return "";
  }

 private:
  static constexpr size_t kGuardBytes = 64;
  static constexpr char kGuard = 0x6b;
  struct Guard {
    size_t first, end;
    std::string name;
  };
  char* base_ = nullptr;
  size_t bytes_;
  size_t used_ = 0;
  std::vector<Guard> guards_;
  MemoryMap map_;
};

}  // namespace dpcomm::emulated
