// Events, also those that other processes know.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstring>

#include "runtime.h"

using namespace fake_cuda;

namespace {

constexpr uint64_t kEventMagic = 0x746e657665656b61;
struct EventHandle {
  uint64_t magic;
  int32_t pid;
  int32_t fd;
  uint64_t inode;
};
static_assert(sizeof(EventHandle) <= sizeof(cudaIpcEventHandle_t));

uint64_t load(const uint64_t* word) { return __atomic_load_n(word, __ATOMIC_SEQ_CST); }

CUevent_st* live(cudaEvent_t event) { return state().events.count(event) != 0 ? event : nullptr; }

SharedEvent* map_shared(int fd) {
  void* page = mmap(nullptr, sizeof(SharedEvent), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  return page == MAP_FAILED ? nullptr : static_cast<SharedEvent*>(page);
}

cudaError_t share(CUevent_st* event) {
  event->fd = memfd_create("fake_cuda_event", MFD_CLOEXEC);
  if (event->fd < 0 || ftruncate(event->fd, sizeof(SharedEvent)) != 0) return cudaErrorUnknown;
  event->shared = map_shared(event->fd);
  return event->shared == nullptr ? cudaErrorUnknown : cudaSuccess;
}

cudaError_t record(CUstream_st* stream, CUevent_st* event) {
  if (event->device != stream->device) return cudaErrorInvalidResourceHandle;
  if (const cudaError_t error = check_legacy(stream); error != cudaSuccess) return error;
  if (stream->capture != nullptr) return record_in_capture(stream, event);
  event->capture = nullptr;
  event->captured.clear();
  if (event->shared == nullptr) {
    event->ticket = enqueue(stream, {});
    return cudaSuccess;
  }
  SharedEvent* shared = event->shared;  // never unmapped
  const uint64_t number = __atomic_add_fetch(&shared->recorded, 1, __ATOMIC_SEQ_CST);
  event->ticket = enqueue(stream, [=] {
    if (load(&shared->complete) < number) {
      __atomic_store_n(&shared->complete, number, __ATOMIC_SEQ_CST);
    }
  });
  return cudaSuccess;
}

cudaError_t wait_for(CUstream_st* stream, CUevent_st* event) {
  if (stream->capture != nullptr || event->capture != nullptr) {
    return wait_in_capture(stream, event);
  }
  if (const cudaError_t error = check_legacy(stream); error != cudaSuccess) return error;
  if (event->opened) {
    const SharedEvent* shared = event->shared;
    const uint64_t number = load(&shared->recorded);
    enqueue(stream, {}, {}, [=] { return load(&shared->complete) >= number; });
  } else if (event->ticket != nullptr) {
    enqueue(stream, {}, {event->ticket});
  }
  return cudaSuccess;
}

bool complete(const CUevent_st& event) {
  if (event.opened) return load(&event.shared->complete) >= load(&event.shared->recorded);
  return event.ticket == nullptr || event.ticket->done;
}

cudaError_t check_host_wait(CUevent_st* event) {
  if (event == nullptr) return cudaErrorInvalidResourceHandle;
  if (event->capture != nullptr) {
    if (!event->capture->ended) invalidate(*event->capture);
    return cudaErrorCapturedEvent;
  }
  return unsafe_call();
}

}  // namespace

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
  return device_call("cudaEventCreateWithFlags", [=](Lock&) {
    const unsigned known = cudaEventBlockingSync | cudaEventDisableTiming | cudaEventInterprocess;
    const bool inter = (flags & cudaEventInterprocess) != 0;
    if (event == nullptr || (flags & ~known) != 0) return cudaErrorInvalidValue;
    if (inter && !(flags & cudaEventDisableTiming)) return cudaErrorInvalidValue;
    auto* made = new CUevent_st;
    made->device = current_device();
    made->flags = flags;
    if (inter) {
      if (const cudaError_t error = share(made); error != cudaSuccess) return error;
    }
    state().events.insert(made);
    *event = made;
    return cudaSuccess;
  });
}

cudaError_t cudaEventCreate(cudaEvent_t* event) {
  return cudaEventCreateWithFlags(event, cudaEventDefault);
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  return device_call("cudaEventDestroy", [=](Lock&) {
    if (state().events.erase(event) == 0) return cudaErrorInvalidResourceHandle;
    if (event->fd >= 0) close(event->fd);
    event->fd = -1;
    return cudaSuccess;
  });
}

cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t handle, unsigned flags) {
  return device_call("cudaEventRecord", [=](Lock&) {
    CUstream_st* stream = resolve(handle);
    if (flags != 0) return cudaErrorNotSupported;
    if (stream == nullptr || live(event) == nullptr) return cudaErrorInvalidResourceHandle;
    return record(stream, event);
  });
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return cudaEventRecordWithFlags(event, stream, 0);
}

cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event, unsigned flags) {
  return device_call("cudaStreamWaitEvent", [=](Lock&) {
    CUstream_st* stream = resolve(handle);
    if (flags != 0) return cudaErrorNotSupported;
    if (stream == nullptr || live(event) == nullptr) return cudaErrorInvalidResourceHandle;
    return wait_for(stream, event);
  });
}

cudaError_t cudaEventQuery(cudaEvent_t event) {
  return device_call("cudaEventQuery", [=](Lock&) {
    const cudaError_t error = check_host_wait(live(event));
    if (error != cudaSuccess) return error;
    return complete(*event) ? state().devices[event->device].broken : cudaErrorNotReady;
  });
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  return device_call("cudaEventSynchronize", [=](Lock& lock) {
    const cudaError_t error = check_host_wait(live(event));
    if (error != cudaSuccess) return error;
    if (event->opened) {
      while (!complete(*event)) {
        state().changed.wait_for(lock, std::chrono::microseconds(100));
      }
    } else {
      const Ticket ticket = event->ticket;
      wait(lock, ticket);
    }
    return state().devices[event->device].broken;
  });
}

cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t end) {
  return device_call("cudaEventElapsedTime", [=](Lock&) {
    if (milliseconds == nullptr) return cudaErrorInvalidValue;
    if (live(start) == nullptr || live(end) == nullptr || start->ticket == nullptr ||
        end->ticket == nullptr || ((start->flags | end->flags) & cudaEventDisableTiming)) {
      return cudaErrorInvalidResourceHandle;
    }
    if (!complete(*start) || !complete(*end)) return cudaErrorNotReady;
    *milliseconds = static_cast<float>(end->ticket->time_ns - start->ticket->time_ns) * 1e-6f;
    return cudaSuccess;
  });
}

cudaError_t cudaIpcGetEventHandle(cudaIpcEventHandle_t* handle, cudaEvent_t event) {
  return device_call("cudaIpcGetEventHandle", [=](Lock&) {
    if (handle == nullptr) return cudaErrorInvalidValue;
    if (live(event) == nullptr || event->fd < 0) return cudaErrorInvalidResourceHandle;
    struct stat info{};
    if (fstat(event->fd, &info) != 0) return cudaErrorUnknown;
    const EventHandle made{kEventMagic, getpid(), event->fd, info.st_ino};
    std::memset(handle, 0, sizeof(*handle));
    std::memcpy(handle, &made, sizeof(made));
    return cudaSuccess;
  });
}

cudaError_t cudaIpcOpenEventHandle(cudaEvent_t* event, cudaIpcEventHandle_t handle) {
  return device_call("cudaIpcOpenEventHandle", [=](Lock&) {
    EventHandle from{};
    std::memcpy(&from, &handle, sizeof(from));
    if (event == nullptr || from.magic != kEventMagic) return cudaErrorInvalidValue;
    if (from.pid == getpid()) return cudaErrorDeviceUninitialized;
    const std::string path = "/proc/" + std::to_string(from.pid) + "/fd/" + std::to_string(from.fd);
    const int fd = open(path.c_str(), O_RDWR | O_CLOEXEC);
    struct stat info{};
    if (fd < 0) return cudaErrorMapBufferObjectFailed;
    SharedEvent* shared =
        fstat(fd, &info) == 0 && info.st_ino == from.inode ? map_shared(fd) : nullptr;
    close(fd);
    if (shared == nullptr) return cudaErrorMapBufferObjectFailed;
    auto* made = new CUevent_st;
    made->device = current_device();
    made->flags = cudaEventDisableTiming;
    made->shared = shared;
    made->opened = true;
    state().events.insert(made);
    *event = made;
    return cudaSuccess;
  });
}
