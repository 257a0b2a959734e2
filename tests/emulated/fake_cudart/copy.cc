// Copies and fills.
#include <cstring>

#include "runtime.h"

using namespace fake_cuda;

namespace {

enum class Side { kDevice, kPinned, kPageable, kInvalid };

/// Which memory [start, start + bytes) is. Memory that the runtime does not know is pageable; a
/// range that only begins or ends in known memory is invalid.
Side side_of(const void* start, size_t bytes) {
  const Allocation* a = find_memory(start, bytes);
  if (a == nullptr) {
    const char* last = static_cast<const char*>(start) + (bytes > 0 ? bytes - 1 : 0);
    const bool partly = find_memory(start, 0) != nullptr || find_memory(last, 0) != nullptr;
    return start == nullptr || partly ? Side::kInvalid : Side::kPageable;
  }
  const bool on_device = a->kind == MemoryKind::kDevice || a->kind == MemoryKind::kPeer;
  return on_device ? Side::kDevice : Side::kPinned;
}

bool matches(cudaMemcpyKind kind, bool from_device, bool to_device) {
  switch (kind) {
    case cudaMemcpyDefault:
      return true;
    case cudaMemcpyHostToHost:
      return !from_device && !to_device;
    case cudaMemcpyHostToDevice:
      return !from_device && to_device;
    case cudaMemcpyDeviceToHost:
      return from_device && !to_device;
    case cudaMemcpyDeviceToDevice:
      return from_device && to_device;
  }
  return false;
}

/// A copy in stream order. Where the host side is pageable, CUDA reads it before, or writes it
/// before, the call returns; where it is pinned, whoever changes it too early is punished.
cudaError_t copy(Lock& lock, void* target, const void* source, size_t bytes, cudaMemcpyKind kind,
                 CUstream_st* stream, bool synchronous) {
  if (stream == nullptr) return cudaErrorInvalidResourceHandle;
  if (static_cast<unsigned>(kind) > cudaMemcpyDefault) return cudaErrorInvalidMemcpyDirection;
  const Side from = side_of(source, bytes);
  const Side to = side_of(target, bytes);
  if (bytes == 0) return cudaSuccess;
  if (from == Side::kInvalid || to == Side::kInvalid) return cudaErrorInvalidValue;
  if (!matches(kind, from == Side::kDevice, to == Side::kDevice)) return cudaErrorInvalidValue;
  if (synchronous) {
    if (const cudaError_t error = unsafe_call(); error != cudaSuccess) return error;
  }
  const bool pageable = from == Side::kPageable || to == Side::kPageable;
  if (pageable && stream->capture != nullptr) {
    invalidate(*stream->capture);
    return cudaErrorStreamCaptureUnsupported;
  }
  std::shared_ptr<std::vector<char>> staged;
  if (from == Side::kPageable) {
    const char* bytes_of_source = static_cast<const char*>(source);
    staged = std::make_shared<std::vector<char>>(bytes_of_source, bytes_of_source + bytes);
  }
  const cudaError_t error = submit(
      stream, Operation{Operation::Kind::kMemcpy, [=] {
                          std::memmove(target, staged != nullptr ? staged->data() : source, bytes);
                        }});
  if (error != cudaSuccess) return error;
  if (synchronous || to == Side::kPageable) {
    wait(lock, stream->last);
    return state().devices[stream->device].broken;
  }
  return cudaSuccess;
}

cudaError_t fill(void* target, int value, size_t bytes, CUstream_st* stream) {
  if (stream == nullptr) return cudaErrorInvalidResourceHandle;
  if (bytes == 0) return cudaSuccess;
  const Side to = side_of(target, bytes);
  if (to != Side::kDevice && to != Side::kPinned) return cudaErrorInvalidValue;
  return submit(stream,
                Operation{Operation::Kind::kMemset, [=] { std::memset(target, value, bytes); }});
}

}  // namespace

cudaError_t cudaMemcpy(void* target, const void* source, size_t bytes, cudaMemcpyKind kind) {
  return device_call("cudaMemcpy", [=](Lock& lock) {
    return copy(lock, target, source, bytes, kind, resolve(nullptr), true);
  });
}

cudaError_t cudaMemcpyAsync(void* target, const void* source, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream) {
  return device_call("cudaMemcpyAsync", [=](Lock& lock) {
    return copy(lock, target, source, bytes, kind, resolve(stream), false);
  });
}

cudaError_t cudaMemcpyPeer(void* target, int target_device, const void* source, int source_device,
                           size_t bytes) {
  return device_call("cudaMemcpyPeer", [=](Lock& lock) {
    if (!valid_device(target_device) || !valid_device(source_device)) {
      return cudaErrorInvalidDevice;
    }
    return copy(lock, target, source, bytes, cudaMemcpyDeviceToDevice, resolve(nullptr), true);
  });
}

cudaError_t cudaMemcpyPeerAsync(void* target, int target_device, const void* source,
                                int source_device, size_t bytes, cudaStream_t stream) {
  return device_call("cudaMemcpyPeerAsync", [=](Lock& lock) {
    if (!valid_device(target_device) || !valid_device(source_device)) {
      return cudaErrorInvalidDevice;
    }
    return copy(lock, target, source, bytes, cudaMemcpyDeviceToDevice, resolve(stream), false);
  });
}

cudaError_t cudaMemset(void* target, int value, size_t bytes) {
  return device_call("cudaMemset", [=](Lock&) {
    return fill(target, value, bytes, resolve(nullptr));  // asynchronous, as with CUDA
  });
}

cudaError_t cudaMemsetAsync(void* target, int value, size_t bytes, cudaStream_t stream) {
  return device_call("cudaMemsetAsync",
                     [=](Lock&) { return fill(target, value, bytes, resolve(stream)); });
}
