// Devices: their number, properties, attributes and peers.
#include <algorithm>
#include <cstdio>
#include <cstring>

#include "runtime.h"

using namespace fake_cuda;

namespace {

/// A virtual device looks like compute capability 9.0 with few multiprocessors.
cudaDeviceProp properties_of(int device) {
  cudaDeviceProp p;
  std::memset(&p, 0, sizeof(p));
  const int physical = config().devices[device];
  std::snprintf(p.name, sizeof(p.name), "host emulation");
  std::snprintf(p.uuid.bytes, sizeof(p.uuid.bytes), "emulated-%03d", physical);
  p.totalGlobalMem = config().memory_bytes;
  p.sharedMemPerBlock = 48 << 10;
  p.sharedMemPerBlockOptin = 227 << 10;
  p.sharedMemPerMultiprocessor = 228 << 10;
  p.reservedSharedMemPerBlock = 1 << 10;
  p.regsPerBlock = p.regsPerMultiprocessor = 64 << 10;
  p.warpSize = 32;
  p.maxThreadsPerBlock = 1024;
  p.maxThreadsDim[0] = p.maxThreadsDim[1] = 1024;
  p.maxThreadsDim[2] = 64;
  p.maxGridSize[0] = 0x7fffffff;
  p.maxGridSize[1] = p.maxGridSize[2] = 65535;
  p.major = 9;
  p.multiProcessorCount = config().sms;
  p.maxThreadsPerMultiProcessor = 2048;
  p.maxBlocksPerMultiProcessor = 32;
  p.canMapHostMemory = p.unifiedAddressing = p.concurrentKernels = 1;
  p.cooperativeLaunch = p.streamPrioritiesSupported = p.ipcEventSupported = 1;
  p.hostRegisterSupported = p.canUseHostPointerForRegisteredMem = 1;
  p.asyncEngineCount = 2;
  p.pciBusID = physical + 1;
  p.l2CacheSize = 1 << 20;
  return p;
}

/// The value of an attribute, or -1 for one that the fake does not have.
int attribute_of(const cudaDeviceProp& p, cudaDeviceAttr attribute) {
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock:
      return p.maxThreadsPerBlock;
    case cudaDevAttrMaxBlockDimX:
      return p.maxThreadsDim[0];
    case cudaDevAttrMaxGridDimX:
      return p.maxGridSize[0];
    case cudaDevAttrMaxGridDimY:
      return p.maxGridSize[1];
    case cudaDevAttrMaxSharedMemoryPerBlock:
      return static_cast<int>(p.sharedMemPerBlock);
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      return static_cast<int>(p.sharedMemPerBlockOptin);
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      return static_cast<int>(p.sharedMemPerMultiprocessor);
    case cudaDevAttrWarpSize:
      return p.warpSize;
    case cudaDevAttrMaxRegistersPerBlock:
      return p.regsPerBlock;
    case cudaDevAttrMaxRegistersPerMultiprocessor:
      return p.regsPerMultiprocessor;
    case cudaDevAttrMultiProcessorCount:
      return p.multiProcessorCount;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      return p.maxThreadsPerMultiProcessor;
    case cudaDevAttrMaxBlocksPerMultiprocessor:
      return p.maxBlocksPerMultiProcessor;
    case cudaDevAttrComputeCapabilityMajor:
      return p.major;
    case cudaDevAttrComputeCapabilityMinor:
      return p.minor;
    case cudaDevAttrCanMapHostMemory:
    case cudaDevAttrUnifiedAddressing:
    case cudaDevAttrConcurrentKernels:
    case cudaDevAttrCooperativeLaunch:
    case cudaDevAttrStreamPrioritiesSupported:
    case cudaDevAttrHostRegisterSupported:
    case cudaDevAttrCanUseHostPointerForRegisteredMem:
    case cudaDevAttrIpcEventSupport:
      return 1;
    case cudaDevAttrHostNativeAtomicSupported:
    case cudaDevAttrIntegrated:
    case cudaDevAttrManagedMemory:
    case cudaDevAttrMemoryPoolsSupported:
    case cudaDevAttrMultiGpuBoardGroupID:
    case cudaDevAttrComputeMode:
    case cudaDevAttrKernelExecTimeout:
    case cudaDevAttrPciDomainId:
    case cudaDevAttrPciDeviceId:
      return 0;
    case cudaDevAttrPciBusId:
      return p.pciBusID;
    case cudaDevAttrL2CacheSize:
      return p.l2CacheSize;
    default:
      return -1;
  }
}

}  // namespace

cudaError_t cudaGetDeviceCount(int* count) {
  if (count != nullptr) *count = 0;
  return device_call("cudaGetDeviceCount", [=](Lock&) {
    if (count == nullptr) return cudaErrorInvalidValue;
    *count = static_cast<int>(state().devices.size());
    return cudaSuccess;
  });
}

cudaError_t cudaDriverGetVersion(int* version) {
  return host_call("cudaDriverGetVersion", [=](Lock&) {
    if (version == nullptr) return cudaErrorInvalidValue;
    *version = config().driver_version;
    return cudaSuccess;
  });
}

cudaError_t cudaRuntimeGetVersion(int* version) {
  return host_call("cudaRuntimeGetVersion", [=](Lock&) {
    if (version == nullptr) return cudaErrorInvalidValue;
    *version = CUDART_VERSION;
    return cudaSuccess;
  });
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  return device_call("cudaGetDeviceProperties", [=](Lock&) {
    if (properties == nullptr) return cudaErrorInvalidValue;
    if (!valid_device(device)) return cudaErrorInvalidDevice;
    *properties = properties_of(device);
    return cudaSuccess;
  });
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  return device_call("cudaDeviceGetAttribute", [=](Lock&) {
    if (value == nullptr) return cudaErrorInvalidValue;
    if (!valid_device(device)) return cudaErrorInvalidDevice;
    const int found = attribute_of(properties_of(device), attribute);
    if (found < 0) return cudaErrorNotSupported;
    *value = found;
    return cudaSuccess;
  });
}

cudaError_t cudaDeviceGetPCIBusId(char* text, int length, int device) {
  return device_call("cudaDeviceGetPCIBusId", [=](Lock&) {
    if (text == nullptr || length < 13) return cudaErrorInvalidValue;
    if (!valid_device(device)) return cudaErrorInvalidDevice;
    std::snprintf(text, length, "0000:%02x:00.0", config().devices[device] + 1);
    return cudaSuccess;
  });
}

cudaError_t cudaInitDevice(int device, unsigned, unsigned) {
  return device_call("cudaInitDevice", [=](Lock&) {
    return valid_device(device) ? cudaSuccess : cudaErrorInvalidDevice;
  });
}

cudaError_t cudaSetDeviceFlags(unsigned) {
  return device_call("cudaSetDeviceFlags", [](Lock&) { return cudaSuccess; });
}

cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  return device_call("cudaDeviceGetStreamPriorityRange", [=](Lock&) {
    if (least != nullptr) *least = 0;
    if (greatest != nullptr) *greatest = -5;
    return cudaSuccess;
  });
}

cudaError_t cudaDeviceCanAccessPeer(int* can, int device, int peer) {
  return device_call("cudaDeviceCanAccessPeer", [=](Lock&) {
    if (can == nullptr) return cudaErrorInvalidValue;
    if (!valid_device(device) || !valid_device(peer)) return cudaErrorInvalidDevice;
    *can = device != peer;
    return cudaSuccess;
  });
}

cudaError_t cudaDeviceGetP2PAttribute(int* value, cudaDeviceP2PAttr attribute, int source,
                                      int target) {
  return device_call("cudaDeviceGetP2PAttribute", [=](Lock&) {
    if (value == nullptr) return cudaErrorInvalidValue;
    if (!valid_device(source) || !valid_device(target)) return cudaErrorInvalidDevice;
    if (source == target) return cudaErrorInvalidDevice;
    *value = attribute == cudaDevP2PAttrAccessSupported ||
             attribute == cudaDevP2PAttrNativeAtomicSupported;
    return cudaSuccess;
  });
}

cudaError_t cudaDeviceEnablePeerAccess(int peer, unsigned flags) {
  return device_call("cudaDeviceEnablePeerAccess", [=](Lock&) {
    if (flags != 0) return cudaErrorInvalidValue;
    if (!valid_device(peer) || peer == current_device()) return cudaErrorInvalidDevice;
    char& enabled = state().devices[current_device()].peers[peer];
    if (enabled) return cudaErrorPeerAccessAlreadyEnabled;
    enabled = 1;
    return cudaSuccess;
  });
}

cudaError_t cudaDeviceDisablePeerAccess(int peer) {
  return device_call("cudaDeviceDisablePeerAccess", [=](Lock&) {
    if (!valid_device(peer)) return cudaErrorInvalidDevice;
    char& enabled = state().devices[current_device()].peers[peer];
    if (!enabled) return cudaErrorPeerAccessNotEnabled;
    enabled = 0;
    return cudaSuccess;
  });
}

cudaError_t cudaDeviceSynchronize() {
  return device_call("cudaDeviceSynchronize", [](Lock& lock) {
    if (const cudaError_t error = unsafe_call(); error != cudaSuccess) return error;
    wait_device(lock, current_device());
    return state().devices[current_device()].broken;
  });
}
