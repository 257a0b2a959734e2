// Memory of virtual devices: a memfd for each allocation, so that other processes can map it. An
// allocation ends at the end of its last page (up to 256 bytes of alignment), behind it lies a page
// that nobody may touch; contents are poisoned before the first and after the last use.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>

#include "runtime.h"

namespace fake_cuda {

Allocation* find_memory(const void* start, size_t bytes) {
  auto& memory = state().memory;
  const auto address = reinterpret_cast<uintptr_t>(start);
  auto next = memory.upper_bound(address);
  if (next == memory.begin()) return nullptr;
  Allocation& found = std::prev(next)->second;
  const size_t offset = static_cast<size_t>(static_cast<const char*>(start) - found.start);
  if (offset > found.bytes || bytes > found.bytes - offset) return nullptr;
  return offset < found.bytes ? &found : nullptr;
}

namespace {

constexpr int kFresh = 0xfb;  // a large negative number in every floating-point format
constexpr int kFreed = 0xfd;
constexpr int kCanary = 0xc5;
constexpr size_t kAlignment = 256;
constexpr uint64_t kMemoryMagic = 0x79726f6d656d6b61;

struct MemoryHandle {
  uint64_t magic;
  int32_t pid;
  int32_t fd;
  uint64_t inode;
  uint64_t offset;
  uint64_t bytes;
  uint64_t mapping_bytes;
  int32_t device;  // physical
};
static_assert(sizeof(MemoryHandle) <= sizeof(cudaIpcMemHandle_t));

size_t aligned(size_t bytes, size_t to) { return (bytes + to - 1) / to * to; }
size_t page() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }

std::string described(const void* start) {
  char text[32];
  std::snprintf(text, sizeof(text), "%p", start);
  return text;
}

/// Maps a memfd with a page behind it that cannot be touched; null on failure.
char* map_guarded(int fd, size_t bytes) {
  void* whole = mmap(nullptr, bytes + page(), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (whole == MAP_FAILED) return nullptr;
  void* inner = mmap(whole, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0);
  return inner == MAP_FAILED ? nullptr : static_cast<char*>(inner);
}

/// The addresses stay taken, so that a late access is a fault and not somebody else's data.
void close_mapping(char* mapping, size_t bytes) {
  mmap(mapping, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0);
}

cudaError_t allocate(void** out, size_t bytes) {
  Device& device = state().devices[current_device()];
  if (device.allocated_bytes + bytes > config().memory_bytes) return cudaErrorMemoryAllocation;
  Allocation made;
  const size_t used = aligned(bytes, kAlignment);
  made.mapping_bytes = aligned(used, page());
  made.fd = memfd_create("fake_cuda", MFD_CLOEXEC);
  if (made.fd < 0) return cudaErrorMemoryAllocation;
  struct stat info{};
  if (posix_fallocate(made.fd, 0, static_cast<off_t>(made.mapping_bytes)) == 0 &&
      fstat(made.fd, &info) == 0) {
    made.mapping = map_guarded(made.fd, made.mapping_bytes);
  }
  if (made.mapping == nullptr) {
    close(made.fd);
    return cudaErrorMemoryAllocation;
  }
  made.inode = info.st_ino;
  made.device = current_device();
  made.bytes = bytes;
  made.start = made.mapping + made.mapping_bytes - used;
  std::memset(made.start, kFresh, bytes);
  std::memset(made.start + bytes, kCanary, used - bytes);
  device.allocated_bytes += bytes;
  *out = made.start;
  state().memory[reinterpret_cast<uintptr_t>(made.start)] = made;
  return cudaSuccess;
}

void check_canary(const Allocation& a) {
  const char* end = a.mapping + a.mapping_bytes;
  for (const char* at = a.start + a.bytes; at < end; ++at) {
    if (*at != static_cast<char>(kCanary)) {
      note_misuse("a write behind the end of an allocation of " + std::to_string(a.bytes) +
                  " bytes, at offset " + std::to_string(at - a.start));
      return;
    }
  }
}

cudaError_t release(Lock& lock, void* start, MemoryKind kind, const char* name) {
  if (start == nullptr) return cudaSuccess;
  const auto found = state().memory.find(reinterpret_cast<uintptr_t>(start));
  if (found == state().memory.end() || found->second.kind != kind) {
    note_misuse(std::string(name) + " of " + described(start) +
                ", which is not the start of such memory (freed before?)");
    return cudaErrorInvalidValue;
  }
  const Allocation a = found->second;
  state().memory.erase(found);  // first: while this thread waits, nobody else may free it
  // As with CUDA, for all work of its own device; what other devices still do with it is a mistake.
  wait_device(lock, kind == MemoryKind::kDevice ? a.device : current_device());
  if (kind == MemoryKind::kDevice) {
    check_canary(a);
    std::memset(a.start, kFreed, a.bytes);
    close(a.fd);
    state().devices[a.device].allocated_bytes -= a.bytes;
  }
  close_mapping(a.mapping, a.mapping_bytes);
  return cudaSuccess;
}

cudaError_t allocate_host(void** out, size_t bytes, unsigned flags) {
  const unsigned known = cudaHostAllocPortable | cudaHostAllocMapped | cudaHostAllocWriteCombined;
  if (out == nullptr || (flags & ~known) != 0) return cudaErrorInvalidValue;
  *out = nullptr;
  if (const cudaError_t error = unsafe_call(); error != cudaSuccess) return error;
  if (bytes == 0) return cudaSuccess;
  Allocation made;
  made.kind = MemoryKind::kHost;
  made.mapping_bytes = aligned(bytes, page());
  void* mapping =
      mmap(nullptr, made.mapping_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (mapping == MAP_FAILED) return cudaErrorMemoryAllocation;
  made.start = made.mapping = static_cast<char*>(mapping);
  made.bytes = bytes;
  made.device = current_device();
  made.flags = flags;
  std::memset(made.start, kFresh, bytes);
  state().memory[reinterpret_cast<uintptr_t>(made.start)] = made;
  *out = made.start;
  return cudaSuccess;
}

cudaError_t open_peer(void** out, const MemoryHandle& from) {
  for (auto& [start, a] : state().memory) {
    if (a.kind == MemoryKind::kPeer && a.inode == from.inode) {
      ++a.opened;
      *out = a.start;
      return cudaSuccess;
    }
  }
  const std::string path = "/proc/" + std::to_string(from.pid) + "/fd/" + std::to_string(from.fd);
  const int fd = open(path.c_str(), O_RDWR | O_CLOEXEC);
  if (fd < 0) return cudaErrorMapBufferObjectFailed;
  struct stat info{};
  Allocation made;
  if (fstat(fd, &info) == 0 && info.st_ino == from.inode) {
    made.mapping = map_guarded(fd, from.mapping_bytes);
  }
  close(fd);
  if (made.mapping == nullptr) return cudaErrorMapBufferObjectFailed;
  made.kind = MemoryKind::kPeer;
  made.device = current_device();
  made.start = made.mapping + from.offset;
  made.bytes = from.bytes;
  made.mapping_bytes = from.mapping_bytes;
  made.inode = from.inode;
  state().memory[reinterpret_cast<uintptr_t>(made.start)] = made;
  *out = made.start;
  return cudaSuccess;
}

}  // namespace
}  // namespace fake_cuda

using namespace fake_cuda;

cudaError_t cudaMalloc(void** out, size_t bytes) {
  return device_call("cudaMalloc", [=](Lock&) {
    if (out == nullptr) return cudaErrorInvalidValue;
    *out = nullptr;
    if (const cudaError_t error = unsafe_call(); error != cudaSuccess) return error;
    return bytes == 0 ? cudaSuccess : allocate(out, bytes);
  });
}

cudaError_t cudaFree(void* start) {
  return device_call("cudaFree", [=](Lock& lock) {
    if (const cudaError_t error = unsafe_call(); error != cudaSuccess) return error;
    return release(lock, start, MemoryKind::kDevice, "cudaFree");
  });
}

cudaError_t cudaHostAlloc(void** out, size_t bytes, unsigned flags) {
  return device_call("cudaHostAlloc", [=](Lock&) { return allocate_host(out, bytes, flags); });
}

cudaError_t cudaMallocHost(void** out, size_t bytes) {
  return device_call("cudaMallocHost", [=](Lock&) { return allocate_host(out, bytes, 0); });
}

cudaError_t cudaFreeHost(void* start) {
  return device_call("cudaFreeHost", [=](Lock& lock) {
    if (const cudaError_t error = unsafe_call(); error != cudaSuccess) return error;
    return release(lock, start, MemoryKind::kHost, "cudaFreeHost");
  });
}

cudaError_t cudaHostGetDevicePointer(void** out, void* host, unsigned flags) {
  return device_call("cudaHostGetDevicePointer", [=](Lock&) {
    const Allocation* a = find_memory(host, 0);
    if (out == nullptr || flags != 0 || a == nullptr ||
        (a->kind != MemoryKind::kHost && a->kind != MemoryKind::kRegistered)) {
      return cudaErrorInvalidValue;
    }
    *out = host;
    return cudaSuccess;
  });
}

cudaError_t cudaHostGetFlags(unsigned* flags, void* host) {
  return device_call("cudaHostGetFlags", [=](Lock&) {
    const Allocation* a = find_memory(host, 0);
    if (flags == nullptr || a == nullptr || a->kind != MemoryKind::kHost) {
      return cudaErrorInvalidValue;
    }
    *flags = a->flags;
    return cudaSuccess;
  });
}

cudaError_t cudaHostRegister(void* start, size_t bytes, unsigned flags) {
  return device_call("cudaHostRegister", [=](Lock&) {
    if (start == nullptr || bytes == 0) return cudaErrorInvalidValue;
    if (find_memory(start, 0) != nullptr) return cudaErrorHostMemoryAlreadyRegistered;
    Allocation made;
    made.kind = MemoryKind::kRegistered;
    made.start = static_cast<char*>(start);
    made.bytes = bytes;
    made.device = current_device();
    made.flags = flags;
    state().memory[reinterpret_cast<uintptr_t>(start)] = made;
    return cudaSuccess;
  });
}

cudaError_t cudaHostUnregister(void* start) {
  return device_call("cudaHostUnregister", [=](Lock&) {
    const auto found = state().memory.find(reinterpret_cast<uintptr_t>(start));
    if (found == state().memory.end() || found->second.kind != MemoryKind::kRegistered) {
      return cudaErrorHostMemoryNotRegistered;
    }
    state().memory.erase(found);
    return cudaSuccess;
  });
}

cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total_bytes) {
  return device_call("cudaMemGetInfo", [=](Lock&) {
    if (free_bytes == nullptr || total_bytes == nullptr) return cudaErrorInvalidValue;
    *total_bytes = config().memory_bytes;
    *free_bytes = *total_bytes - state().devices[current_device()].allocated_bytes;
    return cudaSuccess;
  });
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer) {
  return device_call("cudaPointerGetAttributes", [=](Lock&) {
    if (attributes == nullptr) return cudaErrorInvalidValue;
    *attributes = cudaPointerAttributes{};
    attributes->type = cudaMemoryTypeUnregistered;
    attributes->device = -2;
    attributes->hostPointer = const_cast<void*>(pointer);
    const Allocation* a = find_memory(pointer, 0);
    if (a == nullptr) return cudaSuccess;
    const bool on_device = a->kind == MemoryKind::kDevice || a->kind == MemoryKind::kPeer;
    attributes->type = on_device ? cudaMemoryTypeDevice : cudaMemoryTypeHost;
    attributes->device = a->device;
    attributes->devicePointer = const_cast<void*>(pointer);
    if (on_device) attributes->hostPointer = nullptr;
    return cudaSuccess;
  });
}

cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t* handle, void* start) {
  return device_call("cudaIpcGetMemHandle", [=](Lock&) {
    const auto found = state().memory.find(reinterpret_cast<uintptr_t>(start));
    if (handle == nullptr || found == state().memory.end() ||
        found->second.kind != MemoryKind::kDevice) {
      return cudaErrorInvalidValue;
    }
    const Allocation& a = found->second;
    const MemoryHandle made{kMemoryMagic,
                            getpid(),
                            a.fd,
                            a.inode,
                            static_cast<uint64_t>(a.start - a.mapping),
                            a.bytes,
                            a.mapping_bytes,
                            config().devices[a.device]};
    std::memset(handle, 0, sizeof(*handle));
    std::memcpy(handle, &made, sizeof(made));
    return cudaSuccess;
  });
}

cudaError_t cudaIpcOpenMemHandle(void** out, cudaIpcMemHandle_t handle, unsigned flags) {
  return device_call("cudaIpcOpenMemHandle", [=](Lock&) {
    MemoryHandle from{};
    std::memcpy(&from, &handle, sizeof(from));
    if (out == nullptr || flags != cudaIpcMemLazyEnablePeerAccess) return cudaErrorInvalidValue;
    if (from.magic != kMemoryMagic) return cudaErrorInvalidValue;
    if (from.pid == getpid()) return cudaErrorDeviceUninitialized;
    if (const cudaError_t error = unsafe_call(); error != cudaSuccess) return error;
    return open_peer(out, from);
  });
}

cudaError_t cudaIpcCloseMemHandle(void* start) {
  return device_call("cudaIpcCloseMemHandle", [=](Lock& lock) {
    const auto found = state().memory.find(reinterpret_cast<uintptr_t>(start));
    if (found != state().memory.end() && found->second.kind == MemoryKind::kPeer &&
        --found->second.opened > 0) {
      return cudaSuccess;
    }
    return release(lock, start, MemoryKind::kPeer, "cudaIpcCloseMemHandle");
  });
}
