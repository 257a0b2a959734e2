#include "cuda/peer_memory.h"

#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <random>

namespace dpcomm {
namespace {

constexpr uint64_t kMark = 0x31656c646e616864u;

/// What DeviceHandle's bytes are.
struct Exported {
  uint64_t mark;
  uint64_t process;
  uint64_t address;  ///< in that process
  int32_t rank;
  int32_t device;     ///< ordinal in that process
  int32_t ipc_error;  ///< why `memory` is none
  char bus_id[32];    ///< of the device
  cudaIpcMemHandle_t memory;
};
static_assert(sizeof(Exported) <= sizeof(DeviceHandle));

/// A number that only this process has, also where pids repeat (PID namespaces).
uint64_t process_number() {
  static const uint64_t random = [] {
    std::random_device source;
    return (uint64_t{source()} << 32) | source();
  }();
  return random ^ (static_cast<uint64_t>(getpid()) * 0x9e3779b97f4a7c15u);
}

std::string bus_id_of(int device) {
  char text[32] = {};
  check_cuda(cudaDeviceGetPCIBusId(text, sizeof(text), device), "PCI bus of CUDA device ", device);
  return text;
}

/// The ordinal here of the device at `bus_id`; -1 where CUDA_VISIBLE_DEVICES hides it.
int ordinal_of(const char* bus_id) {
  int count = 0;
  check_cuda(cudaGetDeviceCount(&count), "CUDA devices");
  for (int device = 0; device < count; ++device) {
    if (bus_id_of(device) == bus_id) return device;
  }
  return -1;
}

}  // namespace

DeviceHandle export_memory(int rank, int device, char* memory) {
  Exported exported{};
  exported.mark = kMark;
  exported.process = process_number();
  exported.address = reinterpret_cast<uint64_t>(memory);
  exported.rank = rank;
  exported.device = device;
  std::snprintf(exported.bus_id, sizeof(exported.bus_id), "%s", bus_id_of(device).c_str());
  // Ranks in one process do not need it, so a system without it is told only where it matters.
  exported.ipc_error = static_cast<int32_t>(cudaIpcGetMemHandle(&exported.memory, memory));
  if (exported.ipc_error != cudaSuccess) cudaGetLastError();
  DeviceHandle handle;
  std::memcpy(handle.bytes, &exported, sizeof(exported));
  return handle;
}

std::vector<char*> PeerMemory::open(const std::vector<DeviceHandle>& handles) {
  std::vector<char*> bases;
  for (int peer = 0; peer < static_cast<int>(handles.size()); ++peer) {
    bases.push_back(peer == rank_ ? own_ : open_one(peer, handles[peer]));
  }
  return bases;
}

char* PeerMemory::open_one(int peer, const DeviceHandle& handle) {
  Exported exported;
  std::memcpy(&exported, handle.bytes, sizeof(exported));
  exported.bus_id[sizeof(exported.bus_id) - 1] = '\0';
  if (exported.mark != kMark || exported.rank != peer) {
    throw internal_error("rank ", peer, " sent no handle of its staging");
  }
  const std::string pair =
      str("CUDA device ", device_, " (", bus_id_of(device_), ") of rank ", rank_,
          " and CUDA device ", exported.device, " (", exported.bus_id, ") of rank ", peer);
  const int ordinal = ordinal_of(exported.bus_id);
  if (ordinal >= 0 && ordinal != device_) {
    int can = 0;
    check_cuda(cudaDeviceCanAccessPeer(&can, device_, ordinal), pair);
    if (can == 0) throw usage_error(pair, " cannot reach each other's memory (no peer access)");
  }
  if (exported.process == process_number()) {
    if (ordinal != device_) {
      const cudaError_t error = cudaDeviceEnablePeerAccess(ordinal, 0);
      if (error != cudaErrorPeerAccessAlreadyEnabled) check_cuda(error, pair, ": peer access");
      cudaGetLastError();
    }
    return reinterpret_cast<char*>(exported.address);
  }
  if (exported.ipc_error != cudaSuccess) {
    throw internal_error(pair, ": rank ", peer, " cannot share memory with other processes: ",
                         describe(static_cast<cudaError_t>(exported.ipc_error)));
  }
  void* memory = nullptr;
  const cudaError_t error =
      cudaIpcOpenMemHandle(&memory, exported.memory, cudaIpcMemLazyEnablePeerAccess);
  if (error == cudaErrorPeerAccessUnsupported) {
    cudaGetLastError();
    throw usage_error(pair, " cannot reach each other's memory: ", describe(error));
  }
  check_cuda(error, pair, ": opening memory of another process");
  opened_.push_back(memory);
  return static_cast<char*>(memory);
}

void PeerMemory::close() {
  for (void* memory : opened_) cudaIpcCloseMemHandle(memory);
  opened_.clear();
}

}  // namespace dpcomm
