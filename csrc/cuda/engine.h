// What the communicator knows of a device: an engine that launches collectives on a stream. No CUDA
// header. The implementation lies in a shared library of its own (libdpcomm_cuda.so, beside the
// extension modules) that is loaded when somebody first asks for a device, so that nothing else
// needs a driver, and the device code is in the package once.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "base/dtype.h"
#include "base/reduce_op.h"
#include "cuda/kernel_args.h"
#include "schedule/collective.h"
#include "transport/channel.h"
#include "wire/wire_format.h"

namespace dpcomm {

/// What an engine is made from. All ranks agree on everything but rank, device and stream.
struct DeviceSetup {
  int rank = 0;
  int world = 1;
  int device = 0;            ///< ordinal
  int max_ctas = 16;         ///< thread blocks of an operation (DPCOMM_MAX_CTAS)
  size_t staging_bytes = 0;  ///< the most that staging may take (DPCOMM_STAGING_BYTES)
  void* stream = nullptr;    ///< cudaStream_t for communication; null: the engine makes one
};

/// What a rank tells the others about its staging. Bytes, to be moved as they are.
struct DeviceHandle {
  unsigned char bytes[256] = {};
};

/// A checked operation on device memory, with algorithm and wire format chosen.
struct DeviceTask {
  OpRecord record;  ///< says which operation; its fingerprint without sequence is the tag
  const void* input = nullptr;
  void* output = nullptr;
  double factor = 1;
};

/// One rank's side of the device. Members may be called from any thread, but operations have to be
/// launched in the same order on all ranks. Errors of CUDA are InternalError with CUDA's text;
/// what the kernels do not support is a UsageError.
class DeviceEngine {
 public:
  virtual ~DeviceEngine() = default;

  /// The rank's handle, then everybody's, by rank: afterwards operations can be launched.
  virtual DeviceHandle handle() const = 0;
  virtual void connect(const std::vector<DeviceHandle>& handles) = 0;

  /// The stream (cudaStream_t) that operations run on.
  virtual void* stream() const = 0;
  virtual size_t staging_bytes() const = 0;

  /// Enqueues the operation behind all that `caller` (a cudaStream_t, null: the legacy default
  /// stream) has been given so far. Never blocks the host. Returns a ticket, from 1, in order.
  /// Allowed while `caller` captures a graph: then the operation becomes part of the graph, and
  /// join() has to be called before the capture ends.
  virtual uint64_t launch(const DeviceTask& task, void* caller) = 0;
  /// Lets `caller` wait, on the device, for the operation.
  virtual void join(uint64_t ticket, void* caller) = 0;
  /// True once the device is through with the operation, also after an abort.
  virtual bool complete(uint64_t ticket) = 0;
  /// Blocks the host until all operations are complete.
  virtual void synchronize() = 0;

  /// Ends all waits of this rank's kernels; they publish nothing afterwards. From any thread.
  virtual void abort() = 0;
  virtual bool aborted() const = 0;
  /// The waits that last at this moment.
  virtual std::vector<WaitRecord> waits() const = 0;
};

/// Devices that the CUDA driver shows; 0 with `why` set ("no CUDA device: ...") where there is no
/// library, no driver or no device. Never throws.
int device_count(std::string* why = nullptr);

/// Throws UsageError ("no CUDA device: ...") where there is none.
std::unique_ptr<DeviceEngine> make_device_engine(const DeviceSetup& setup);

}  // namespace dpcomm
