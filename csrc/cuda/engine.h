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
#include "cuda/layout.h"
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
  OpRecord record;   ///< says which operation
  uint32_t tag = 1;  ///< what all ranks agree on, as a number that is not 0
  const void* input = nullptr;
  void* output = nullptr;
};

/// How far the device is with an operation.
enum class Progress {
  kBehind,   ///< it waits for what the caller's stream, or the engine's, does before
  kRunning,  ///< it may run
  kComplete,
  kInGraph,  ///< it became part of a graph, with which it runs
};

/// One rank's side of the device. Members may be called from any thread, but operations have to be
/// launched in the same order on all ranks. Errors of CUDA are InternalError with CUDA's text;
/// what the kernels do not support is a UsageError.
class DeviceEngine {
 public:
  /// Frees the staging: no peer may be connected to it any more.
  virtual ~DeviceEngine() = default;

  /// The rank's handle, then everybody's, by rank: once all ranks are connected, operations can be
  /// launched. Throws UsageError naming both ranks where their devices cannot reach each other.
  virtual DeviceHandle handle() const = 0;
  virtual void connect(const std::vector<DeviceHandle>& handles) = 0;
  /// Lets go of the peers' staging. No operation may be in flight, and none can be launched after.
  /// If operations are part of graphs, waits until the device is idle: nobody knows what of them
  /// is on its way.
  virtual void disconnect() = 0;
  /// For a thread of the library's own: makes the engine's device its current one for good.
  virtual void adopt_thread() = 0;

  /// The stream (cudaStream_t) that operations run on.
  virtual void* stream() const = 0;
  virtual const StagingGeometry& geometry() const = 0;
  virtual size_t staging_bytes() const = 0;

  /// Enqueues the operation behind all that `caller` (a cudaStream_t, null: the legacy default
  /// stream) has been given so far. Does not wait for the device. Returns a ticket, from 1, in
  /// order. Allowed while `caller` captures a graph: then the operation becomes part of the graph,
  /// and join() has to be called before the capture ends. A graph has to be launched on a stream
  /// that has joined the operations before it.
  virtual uint64_t launch(const DeviceTask& task, void* caller) = 0;
  /// Lets `caller` wait, on the device, for the operation and all before it.
  virtual void join(uint64_t ticket, void* caller) = 0;
  /// kComplete also after an abort. kInGraph at least until the next launch, then kComplete.
  virtual Progress progress(uint64_t ticket) = 0;
  /// True once the device is through with the operation, or if it became part of a graph.
  bool complete(uint64_t ticket) { return progress(ticket) >= Progress::kComplete; }
  /// Blocks the host until all operations are complete.
  virtual void synchronize() = 0;

  /// Ends all waits of this rank's kernels; they publish nothing afterwards. From any thread; never
  /// blocks.
  virtual void abort() = 0;
  virtual bool aborted() const = 0;
  /// The waits that last at this moment. Never blocks.
  virtual std::vector<WaitRecord> waits() const = 0;
};

/// All ranks of a group in one process, on one device: an operation is one cooperative launch over
/// them all. For tests and debugging. Members as those of DeviceEngine; one thread at a time.
class VirtualGroup {
 public:
  virtual ~VirtualGroup() = default;
  virtual const StagingGeometry& geometry() const = 0;
  virtual size_t staging_bytes() const = 0;  ///< of all ranks together
  /// Launches the operation for all ranks on `stream`; input[r] and output[r] are rank r's.
  virtual void launch(const OpRecord& record, uint32_t tag, const std::vector<const void*>& input,
                      const std::vector<void*>& output, void* stream) = 0;
  virtual void abort() = 0;
  virtual std::vector<WaitRecord> waits() const = 0;
};

/// Devices that the CUDA driver shows; 0 with `why` set ("no CUDA device: ...") where there is no
/// library, no driver or no device. Never throws.
int device_count(std::string* why = nullptr);

/// The ordinal of the device that the memory lies on; -1 where it is no device's, or nobody knows.
int device_of(const void* memory);

/// The CTAs per operation, at most `wanted`, that the device can hold at once with `ranks` ranks in
/// a launch. Throws UsageError ("no CUDA device: ...") where there is no such device.
int resident_ctas(int device, int ranks, int wanted);

/// Throws UsageError ("no CUDA device: ...") where there is none.
std::unique_ptr<DeviceEngine> make_device_engine(const DeviceSetup& setup);

/// `setup.rank` does not matter.
std::unique_ptr<VirtualGroup> make_virtual_group(const DeviceSetup& setup);

}  // namespace dpcomm
