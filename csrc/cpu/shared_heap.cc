#include "cpu/shared_heap.h"

#include <fcntl.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <unordered_map>
#include <utility>

#include "base/error.h"
#include "base/log.h"
#include "cpu/host_memory.h"

namespace dpcomm {
namespace {

constexpr uint64_t kMagic = 0x70616568'6d6d6364;  // "dcmmheap" in memory
constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kAskFirst = size_t{16} << 20;  // from here on the system is asked what it has left
#ifdef MADV_POPULATE_WRITE
constexpr int kPopulate = MADV_POPULATE_WRITE;
#else
constexpr int kPopulate = 23;
#endif

/// At the start of a heap.
struct Header {
  uint64_t magic;
  uint64_t id;
  uint64_t bytes;
};

size_t page_bytes() {
  static const size_t bytes = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return bytes;
}

constexpr uint64_t round_up(uint64_t value, uint64_t unit) {
  return (value + unit - 1) / unit * unit;
}

class Descriptor {
 public:
  explicit Descriptor(int fd) : fd_(fd) {}
  ~Descriptor() {
    if (fd_ >= 0) ::close(fd_);
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  int get() const { return fd_; }
  int release() { return std::exchange(fd_, -1); }

 private:
  int fd_;
};

std::byte* map_shared(void* where, size_t bytes, int fd) {
  const int fixed = where == nullptr ? 0 : MAP_FIXED;
  void* base =
      mmap(where, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE | fixed, fd, 0);
  return base == MAP_FAILED ? nullptr : static_cast<std::byte*>(base);
}

/// Maps the whole file at the start of a huge page; null and errno if that cannot be.
std::byte* map_aligned(size_t bytes, int fd) {
  const size_t room = bytes + kHugePage;
  void* reserved =
      mmap(nullptr, room, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (reserved == MAP_FAILED) return nullptr;
  auto* first = static_cast<std::byte*>(reserved);
  std::byte* base = first + (round_up(reinterpret_cast<uintptr_t>(first), kHugePage) -
                             reinterpret_cast<uintptr_t>(first));
  if (map_shared(base, bytes, fd) == nullptr) {
    const int error = errno;
    munmap(reserved, room);
    errno = error;
    return nullptr;
  }
  if (base != first) munmap(first, base - first);
  if (base + bytes != first + room) munmap(base + bytes, first + room - (base + bytes));
  madvise(base, bytes, MADV_HUGEPAGE);  // a wish
  return base;
}

Error no_address_space(size_t bytes, int error) {
  return usage_error("cannot map ", bytes >> 20,
                     " MiB of addresses for shared memory: ", strerror(error),
                     "; raise the limit of virtual memory (ulimit -v)");
}

uint64_t fresh_id() {
  std::random_device random;
  for (;;) {
    const uint64_t id = uint64_t{random()} << 32 | random();
    if (id != 0) return id;
  }
}

/// The free parts of a heap, by offset. Neighbours are one part.
class FreeRanges {
 public:
  FreeRanges(uint64_t offset, uint64_t bytes) { ranges_.emplace(offset, bytes); }

  /// The lowest place for the bytes.
  std::optional<uint64_t> take(uint64_t bytes, uint64_t alignment) {
    for (auto range = ranges_.begin(); range != ranges_.end(); ++range) {
      const auto [start, length] = *range;
      const uint64_t offset = round_up(start, alignment);
      if (offset - start > length || length - (offset - start) < bytes) continue;
      ranges_.erase(range);
      if (offset != start) ranges_.emplace(start, offset - start);
      const uint64_t rest = length - (offset - start) - bytes;
      if (rest != 0) ranges_.emplace(offset + bytes, rest);
      return offset;
    }
    return std::nullopt;
  }

  void give(uint64_t offset, uint64_t bytes) {
    auto next = ranges_.lower_bound(offset);
    if (next != ranges_.end() && offset + bytes == next->first) {
      bytes += next->second;
      next = ranges_.erase(next);
    }
    if (next != ranges_.begin()) {
      const auto before = std::prev(next);
      if (before->first + before->second == offset) {
        before->second += bytes;
        return;
      }
    }
    ranges_.emplace(offset, bytes);
  }

 private:
  std::map<uint64_t, uint64_t> ranges_;
};

class Heap {
 public:
  /// Throws as allocate() does.
  static std::unique_ptr<Heap> create();
  ~Heap();

  void* allocate(size_t bytes);
  void free(void* block);
  bool contains(const void* data, size_t bytes) const {
    const auto offset = reinterpret_cast<uintptr_t>(data) - reinterpret_cast<uintptr_t>(base_);
    return offset <= bytes_ && bytes <= bytes_ - offset;
  }
  uint64_t offset_of(const void* data) const {
    return static_cast<uint64_t>(static_cast<const std::byte*>(data) - base_);
  }
  bool has(uint64_t offset, size_t bytes) const {
    return offset <= bytes_ && bytes <= bytes_ - offset;
  }
  std::byte* at(uint64_t offset) const { return base_ + offset; }
  /// The block around the offset is not to be given out again.
  void keep(uint64_t offset);
  HeapHandle handle() const { return HeapHandle{id_, fd_, bytes_}; }
  size_t allocated_bytes() const {
    const std::lock_guard lock(mutex_);
    return allocated_bytes_;
  }
  pid_t owner() const { return owner_; }
  Heap* parents = nullptr;  ///< in a forked child: the heap that the parent had from its parent
  /// In a child just forked: only what a signal handler may do.
  void close_in_child() const;

 private:
  Heap(int fd, std::byte* base, size_t bytes);
  void reserve(uint64_t offset, size_t bytes);
  /// False if the pages could not be given back.
  bool punch(uint64_t offset, size_t bytes) const {
    return madvise(base_ + offset, bytes, MADV_REMOVE) == 0;
  }

  const pid_t owner_ = getpid();
  const int fd_;
  std::byte* const base_;
  const size_t bytes_;
  const uint64_t id_ = fresh_id();
  dev_t device_ = 0;  // with inode_, what fd_ means as long as nobody closes it
  ino_t inode_ = 0;
  mutable std::mutex mutex_;
  FreeRanges free_;
  std::unordered_map<uint64_t, size_t> blocks_;
  std::set<uint64_t> kept_;  // offsets of blocks that are not given out again
  size_t allocated_bytes_ = 0;
};

Heap::Heap(int fd, std::byte* base, size_t bytes)
    : fd_(fd), base_(base), bytes_(bytes), free_(page_bytes(), bytes - page_bytes()) {
  struct stat status;
  if (fstat(fd_, &status) == 0) {
    device_ = status.st_dev;
    inode_ = status.st_ino;
  }
}

Heap::~Heap() {
  munmap(base_, bytes_);
  ::close(fd_);
}

std::unique_ptr<Heap> Heap::create() {
  const size_t memory = static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) * page_bytes();
  const size_t bytes = round_up(memory, kHugePage);
  rlimit limit;
  if (getrlimit(RLIMIT_FSIZE, &limit) == 0 && limit.rlim_cur < bytes) {
    // A file longer than that would be a signal, SIGXFSZ.
    throw usage_error("cannot make shared memory: the limit of the length of files is ",
                      limit.rlim_cur >> 20, " MiB, and ", bytes >> 20,
                      " MiB are needed, most of them empty; raise it (ulimit -f)");
  }
  Descriptor fd(memfd_create("dpcomm-heap", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (fd.get() < 0) throw internal_error("memfd_create: ", strerror(errno));
  // Sealed: a peer that has mapped it needs no fear of SIGBUS.
  if (fchmod(fd.get(), 0600) != 0 || ftruncate(fd.get(), static_cast<off_t>(bytes)) != 0 ||
      fcntl(fd.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0) {
    throw internal_error("cannot make shared memory: ", strerror(errno));
  }
  std::byte* base = map_aligned(bytes, fd.get());
  if (base == nullptr) throw no_address_space(bytes, errno);
  std::unique_ptr<Heap> heap(new Heap(fd.release(), base, bytes));
  heap->reserve(0, page_bytes());
  *reinterpret_cast<Header*>(base) = Header{kMagic, heap->id_, bytes};
  return heap;
}

void Heap::reserve(uint64_t offset, size_t bytes) {
  // Through the mapping, as fallocate takes no huge pages where they are had for asking only.
  if (madvise(base_ + offset, bytes, kPopulate) == 0) return;
  int error = errno;
  if (error == EINVAL) {  // older than Linux 5.14
    while ((error = posix_fallocate(fd_, static_cast<off_t>(offset), static_cast<off_t>(bytes))) ==
           EINTR) {
    }
    if (error == 0) return;
  }
  punch(offset, bytes);
  if (error == ENOSPC || error == ENOMEM || error == EFAULT || error == EDQUOT) {
    throw usage_error("cannot reserve ", bytes, " bytes of shared memory: ", strerror(error),
                      "; free memory, or raise the memory limit of the container or job");
  }
  throw internal_error("cannot reserve ", bytes, " bytes of shared memory: ", strerror(error));
}

void* Heap::allocate(size_t wanted) {
  const size_t most = bytes_ - page_bytes();
  if (wanted > most) {
    throw usage_error("cannot reserve ", wanted, " bytes of shared memory: this machine has ",
                      bytes_ >> 20, " MiB of memory");
  }
  const size_t bytes = round_up(std::max<size_t>(wanted, 1), page_bytes());
  if (bytes >= kAskFirst) {
    const size_t left = available_memory();
    if (bytes > left) {
      throw usage_error("cannot reserve ", bytes, " bytes of shared memory: ", left >> 20,
                        " MiB are left; free memory, or raise the memory limit of the container "
                        "or job");
    }
  }
  std::optional<uint64_t> offset;
  {
    const std::lock_guard lock(mutex_);
    offset = free_.take(bytes, bytes >= kHugePage ? kHugePage : page_bytes());
  }
  if (!offset) {
    throw usage_error("cannot reserve ", bytes, " bytes of shared memory: no free part of its ",
                      bytes_ >> 20, " MiB is so long; free some of it");
  }
  try {
    reserve(*offset, bytes);
  } catch (...) {
    const std::lock_guard lock(mutex_);
    free_.give(*offset, bytes);
    throw;
  }
  const std::lock_guard lock(mutex_);
  blocks_.emplace(*offset, bytes);
  allocated_bytes_ += bytes;
  return base_ + *offset;
}

void Heap::free(void* block) {
  const uint64_t offset = offset_of(block);
  size_t bytes = 0;
  bool kept = false;
  {
    const std::lock_guard lock(mutex_);
    kept = kept_.count(offset) > 0;
    const auto found = blocks_.find(offset);
    if (found != blocks_.end()) {
      bytes = found->second;
      blocks_.erase(found);
      allocated_bytes_ -= bytes;
    }
  }
  if (bytes == 0) {
    log_line(LogLevel::kWarn, "freed twice, or no block of shared memory");
  } else if (!punch(offset, bytes)) {
    // Not zero, so not to be given out again.
    log_line(LogLevel::kWarn, str("cannot give shared memory back: ", strerror(errno)));
  } else if (!kept) {
    const std::lock_guard lock(mutex_);
    free_.give(offset, bytes);
  }
}

void Heap::keep(uint64_t offset) {
  const std::lock_guard lock(mutex_);
  for (const auto& [first, bytes] : blocks_) {
    if (first <= offset && offset - first < bytes) kept_.insert(first);
  }
}

void Heap::close_in_child() const {
  struct stat status;
  if (fstat(fd_, &status) == 0 && status.st_dev == device_ && status.st_ino == inode_) {
    ::close(fd_);
  }
}

/// Heaps are never destroyed: tensors are freed till the very end.
struct Registry {
  std::atomic<Heap*> heap{nullptr};
  std::atomic<Heap*> parents{nullptr};  // those of the processes that this one was forked from
};

constinit Registry own_registry;
constinit Registry* shared_registry = &own_registry;

/// A child has its parent's blocks, but no heap.
void leave_heap_to_parent() {
  Heap* heap = shared_registry->heap.exchange(nullptr);
  if (heap == nullptr) return;
  heap->parents = shared_registry->parents.load();
  shared_registry->parents.store(heap);
  heap->close_in_child();
}

Heap* current_heap() { return shared_registry->heap.load(); }

Heap& make_heap() {
  static const int registered = pthread_atfork(nullptr, nullptr, &leave_heap_to_parent);
  (void)registered;
  std::unique_ptr<Heap> made = Heap::create();
  Heap* there = nullptr;
  // Another thread may have been faster.
  return shared_registry->heap.compare_exchange_strong(there, made.get()) ? *made.release()
                                                                          : *there;
}

}  // namespace

void* SharedHeap::allocate(size_t bytes) {
  Heap* heap = current_heap();
  if (heap != nullptr && heap->owner() != getpid()) {  // a child that no handler knows of
    leave_heap_to_parent();
    heap = nullptr;
  }
  return (heap != nullptr ? *heap : make_heap()).allocate(bytes);
}

void SharedHeap::free(void* block) {
  Heap* heap = current_heap();
  if (heap == nullptr || !heap->contains(block, 1) || heap->owner() != getpid()) return;
  heap->free(block);
}

std::optional<uint64_t> SharedHeap::offset_of(const void* data, size_t bytes) {
  const Heap* heap = current_heap();
  if (heap == nullptr || !heap->contains(data, bytes)) return std::nullopt;
  return heap->offset_of(data);
}

bool SharedHeap::holds(const void* block) {
  const Heap* heap = current_heap();
  if (heap != nullptr && heap->contains(block, 1)) return true;
  for (heap = shared_registry->parents.load(); heap != nullptr; heap = heap->parents) {
    if (heap->contains(block, 1)) return true;
  }
  return false;
}

std::byte* SharedHeap::at(uint64_t offset, size_t bytes) {
  const Heap* heap = current_heap();
  if (heap == nullptr || !heap->has(offset, bytes)) {
    throw internal_error("no ", bytes, " bytes of shared memory at ", offset);
  }
  return heap->at(offset);
}

void SharedHeap::keep(const void* data) {
  Heap* heap = current_heap();
  if (heap != nullptr && heap->contains(data, 1)) heap->keep(heap->offset_of(data));
}

HeapHandle SharedHeap::handle() {
  const Heap* heap = current_heap();
  return heap == nullptr ? HeapHandle{} : heap->handle();
}

size_t SharedHeap::allocated_bytes() {
  const Heap* heap = current_heap();
  return heap == nullptr ? 0 : heap->allocated_bytes();
}

void* SharedHeap::registry() { return shared_registry; }
void SharedHeap::share(void* registry) { shared_registry = static_cast<Registry*>(registry); }

PeerHeap::PeerHeap(pid_t pid, const HeapHandle& handle) {
  const std::string path = str("/proc/", pid, "/fd/", handle.fd);
  const auto refused = [&](const std::string& why) {
    return internal_error("cannot use the shared memory of process ", pid, ": ", path, why);
  };
  const Descriptor fd(::open(path.c_str(), O_RDWR | O_CLOEXEC | O_NONBLOCK | O_NOCTTY));
  if (fd.get() < 0) throw refused(str(": ", strerror(errno)));
  struct stat status;
  const int seals = fcntl(fd.get(), F_GET_SEALS);
  if (fstat(fd.get(), &status) != 0 || !S_ISREG(status.st_mode) || handle.id == 0 ||
      handle.bytes < page_bytes() || static_cast<uint64_t>(status.st_size) != handle.bytes ||
      seals < 0 || (seals & F_SEAL_SHRINK) == 0) {
    throw refused(str(" is no heap of ", handle.bytes, " bytes"));
  }
  bytes_ = handle.bytes;
  base_ = map_aligned(bytes_, fd.get());
  if (base_ == nullptr) throw no_address_space(bytes_, errno);
  const auto* header = reinterpret_cast<const Header*>(base_);
  if (header->magic != kMagic || header->id != handle.id || header->bytes != handle.bytes) {
    munmap(base_, bytes_);
    throw refused(" is another heap");
  }
}

PeerHeap::~PeerHeap() { munmap(base_, bytes_); }

std::byte* PeerHeap::at(uint64_t offset, size_t bytes) const {
  if (offset < page_bytes() || offset > bytes_ || bytes > bytes_ - offset) {
    throw internal_error("a peer speaks of ", bytes, " bytes at ", offset,
                         " of its shared memory, which has ", bytes_);
  }
  return base_ + offset;
}

}  // namespace dpcomm
