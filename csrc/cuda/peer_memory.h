// A rank's staging as its peers see it: in the same process by its address, in others over cudaIpc.
#pragma once

#include <vector>

#include "cuda/engine.h"
#include "cuda/runtime.h"

namespace dpcomm {

/// What a rank tells the others of memory that starts at `memory` on the current device.
DeviceHandle export_memory(int rank, int device, char* memory);

/// The peers' memory. Made and destroyed with the own device current.
class PeerMemory {
 public:
  PeerMemory(int rank, int device, char* own) : rank_(rank), device_(device), own_(own) {}
  ~PeerMemory() { close(); }
  PeerMemory(const PeerMemory&) = delete;
  PeerMemory& operator=(const PeerMemory&) = delete;

  /// Makes the memory of all ranks reachable and returns where each lies, by rank. Throws
  /// UsageError naming both ranks where two devices cannot reach each other.
  std::vector<char*> open(const std::vector<DeviceHandle>& handles);
  void close();

 private:
  char* open_one(int peer, const DeviceHandle& handle);

  const int rank_;
  const int device_;
  char* const own_;
  std::vector<void*> opened_;
};

}  // namespace dpcomm
