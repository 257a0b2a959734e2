// CUDA's runtime as the host's side of the device uses it: errors become exceptions, and the
// current device of a thread stays what it was. For libdpcomm_cuda.so only.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "base/error.h"

namespace dpcomm {

/// "out of memory (CUDA error 2)".
std::string describe(cudaError_t error);

/// Throws InternalError "<what>: <CUDA's text>" unless all went well.
template <class... Parts>
void check_cuda(cudaError_t error, const Parts&... what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // it is told here, and not once more by the next call
  throw internal_error(what..., ": ", describe(error));
}

/// Makes a device current while it lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check_cuda(cudaGetDevice(&before_), "the current CUDA device");
    if (before_ == device) return;
    check_cuda(cudaSetDevice(device), "CUDA device ", device);
    changed_ = true;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

/// While it lives, calls of this thread that a capture of another thread would forbid are allowed:
/// those of the library touch nothing that is captured.
class CaptureGuard {
 public:
  CaptureGuard() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~CaptureGuard() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  CaptureGuard(const CaptureGuard&) = delete;
  CaptureGuard& operator=(const CaptureGuard&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

/// Throws UsageError ("no CUDA device: ...") unless there is a device of that number.
void require_device(int device);

}  // namespace dpcomm
