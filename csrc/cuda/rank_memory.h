// The memory that a rank has on its device, and the words that it shares with the host.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "cuda/kernel_args.h"
#include "cuda/layout.h"
#include "cuda/runtime.h"

namespace dpcomm {

/// Copies to memory of the current device; complete on return. Neither this nor DeviceMemory
/// touches the default stream, which would wait for the caller's streams, or spoil what they
/// capture.
void copy_to_device(void* target, const void* source, size_t bytes, const char* what);

/// Zeroed memory of the device that is current at the start.
class DeviceMemory {
 public:
  DeviceMemory(size_t bytes, const char* what);
  ~DeviceMemory() { cudaFree(memory_); }
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;
  char* get() const { return static_cast<char*>(memory_); }

 private:
  void* memory_ = nullptr;
};

/// The abort word and the records of waits: host memory that the device reads and writes.
class HostWords {
 public:
  explicit HostWords(int ctas);
  ~HostWords() { cudaFreeHost(host_); }
  HostWords(const HostWords&) = delete;
  HostWords& operator=(const HostWords&) = delete;

  // From any thread; they never block.
  void abort();
  /// By abort(). (Kernels leave, too, once one of them has found that the ranks disagree.)
  bool aborted() const { return aborted_.load(); }
  std::vector<WaitRecord> waits() const;

  uint32_t* abort_on_device() const { return reinterpret_cast<uint32_t*>(device_); }
  WaitRecord* waits_on_device() const {
    return reinterpret_cast<WaitRecord*>(device_ + kFlagLineBytes);
  }

 private:
  const int records_;
  std::atomic<bool> aborted_{false};
  char* host_ = nullptr;
  char* device_ = nullptr;
};

/// Everything of one rank. Made and destroyed with its device current.
class RankMemory {
 public:
  RankMemory(int rank, const StagingLayout& layout);

  char* staging() const { return staging_.get(); }
  HostWords& words() { return words_; }
  const HostWords& words() const { return words_; }
  /// Writes the tables for peers whose staging is at `bases` (by rank, as this rank's device sees
  /// it), and returns what kernels need of them.
  RankState connect(const StagingLayout& layout, const std::vector<char*>& bases);

 private:
  const int rank_;
  HostWords words_;
  DeviceMemory staging_;
  DeviceMemory tables_;  // ends, counts, packet buffers, epochs
};

}  // namespace dpcomm
