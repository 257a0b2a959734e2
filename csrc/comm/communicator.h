// A communicator: the ranks of a group, and the operations that they run in the same order.
#pragma once

#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "base/dtype.h"
#include "base/reduce_op.h"
#include "comm/work.h"
#include "schedule/collective.h"
#include "transport/bootstrap.h"
#include "transport/channel.h"
#include "wire/wire_format.h"

namespace dpcomm {

/// What a user can choose for a communicator. Defaults come from the DPCOMM_* environment.
struct CommunicatorOptions {
  WireFormat wire = WireFormat::kNative;  ///< the lossiest format allowed (DPCOMM_WIRE)
  bool wire_on_all_links = false;         ///< also within a host (DPCOMM_WIRE_LINKS=all)
  std::string algorithm = "auto";         ///< or a name of schedule/algorithms.def (DPCOMM_ALGO)
  std::string path = "auto";              ///< within a host; or "channels" (DPCOMM_PATH)
  std::chrono::milliseconds timeout{600000};  ///< of each operation and of the start
  std::string transport = "auto";             ///< "shm", "inproc" (DPCOMM_TRANSPORT)
  std::string name = "default";               ///< unique per group and generation in its store
  /// Of a group of torch: DDP's gradient buckets lie in shared memory (DPCOMM_SHARED_BUCKETS).
  bool shared_buckets = true;
  /// Of every rank of the group: its rank among all of the job, for what a user reads. Empty: the
  /// group has all ranks.
  std::vector<int> global_ranks;

  /// Reads the environment. Throws UsageError naming the variable for a value that makes no sense.
  static CommunicatorOptions from_environment();
};

/// One collective operation on buffers that the caller keeps alive until it is complete.
struct Operation {
  Collective collective = Collective::kAllReduce;
  /// all-reduce, broadcast, reduce: count elements. all-gather, gather: count elements in, world *
  /// count out. reduce-scatter, scatter: world * count in, count out. all-to-all: world * count
  /// both. Input and output are the same buffer (or the own block of the larger one) or do not
  /// overlap; those of an all-to-all never do. Ranks that only send may leave output null, ranks
  /// that only receive may leave input null.
  const void* input = nullptr;
  void* output = nullptr;
  size_t count = 0;
  /// Blocks of unequal size, for what moves blocks (all_gather, gather, scatter, reduce_scatter,
  /// all_to_all); empty: blocks of `count` elements, else `count` is not looked at. Blocks lie one
  /// after the other in the larger buffer (in both of an all_to_all). Elements of each rank's
  /// block, alike on all ranks; of an all_to_all, elements that this rank sends to each rank.
  std::vector<size_t> counts;
  /// Of an all_to_all with `counts`: elements that this rank receives from each rank, which is what
  /// that rank sends; if not, both raise a UsageError.
  std::vector<size_t> recv_counts;
  Dtype dtype = Dtype::kFloat32;
  ReduceOp op = ReduceOp::kSum;
  double factor = 1;  ///< of PREMUL_SUM
  int root = 0;       ///< of broadcast, reduce, gather and scatter
  // Per call, in place of the communicator's options:
  std::optional<WireFormat> wire;
  std::string algorithm;                 ///< empty: the communicator's
  std::chrono::milliseconds timeout{0};  ///< zero: the communicator's
  /// Not empty: why this rank cannot run it (refuse()). Nothing else of it is looked at then.
  std::string refusal;
  /// Asked by run() about every 50 ms while it waits, in the thread that called it. True ends the
  /// operation, and the communicator on all ranks, with a PeerError: the way out for Ctrl-C.
  std::function<bool()> interrupted;
};

/// The operations of one collective that are complete; of those on a device, that were given to it,
/// without wire_bytes and busy_ns.
struct CollectiveStats {
  uint64_t operations = 0;
  uint64_t bytes = 0;  ///< of tensors, as in CommunicatorStats
  uint64_t wire_bytes = 0;
  uint64_t busy_ns = 0;  ///< from where they began to where they ended
};

/// What happened since the communicator was made.
struct CommunicatorStats {
  uint64_t operations = 0;
  uint64_t messages = 0;         ///< sends and receives that are complete
  uint64_t bytes = 0;            ///< of the tensors of finished operations and messages
  uint64_t wire_bytes = 0;       ///< sent by this rank over channels
  uint64_t wait_ns = 0;          ///< spent in operations without a step to do
  uint64_t exposed_wait_ns = 0;  ///< that callers spent in run() and in waits for a work
  std::array<CollectiveStats, kCollectives> collectives;  ///< by Collective
};

/// All members may be called from any thread; operations run in the order in which they were given,
/// which has to be the same on every rank.
class Communicator {
 public:
  /// Meets the other ranks through `bootstrap`. Collective; throws TimeoutError naming the ranks
  /// that did not come.
  static std::shared_ptr<Communicator> create(int rank, int world, Bootstrap& bootstrap,
                                              const CommunicatorOptions& options);
  /// On a transport that exists already (tests).
  Communicator(std::unique_ptr<Transport> transport, const CommunicatorOptions& options);
  ~Communicator();
  Communicator(const Communicator&) = delete;
  Communicator& operator=(const Communicator&) = delete;

  int rank() const;
  int world() const;
  /// Slots of the channels of a lane; what an oracle of partitions has to know.
  LaneGeometry geometry(int lane) const;
  const CommunicatorOptions& options() const;

  /// Runs the operation to its end; in the caller's thread if no other one is in flight. Throws
  /// UsageError before any byte is sent if the operation makes no sense, else PeerError,
  /// TimeoutError or UsageError (ranks disagree), after which the communicator is unusable.
  void run(const Operation& operation);

  /// Hands the operation to the progress thread and returns at once.
  std::shared_ptr<Work> submit(const Operation& operation);

  /// In place of an operation that only this rank knows to make no sense, while the others wait for
  /// it: ends the communicator on all ranks, and throws, everywhere the same UsageError, which
  /// names this rank, the collective and `reason`. Waits for what this rank was given before; a
  /// peer that is not so far yet sees the error there.
  [[noreturn]] void refuse(Collective collective, const std::string& reason);

  // --- messages between two ranks. They have no part in the order of operations: they go on beside
  // them and beside each other, in any order of tags.
  /// Sends `bytes` bytes to `peer`, not this rank itself; complete when the buffer is the caller's
  /// again, which may be before or after the peer receives. The n-th send to a peer with a tag
  /// meets the peer's n-th receive from this rank with that tag. Returns at once.
  /// Errors as of submit(); sizes that differ are a UsageError at both ends, naming both.
  std::shared_ptr<Work> send(int peer, uint32_t tag, const void* data, size_t bytes,
                             std::chrono::milliseconds timeout = std::chrono::milliseconds(0));
  /// Receives a message of exactly `bytes` bytes with this tag from `peer`, or, for kAnySource, the
  /// first one that nobody else has been promised; Work::source() then says whose. Receives are
  /// served in the order in which they were given. Returns at once.
  std::shared_ptr<Work> recv(int peer, uint32_t tag, void* data, size_t bytes,
                             std::chrono::milliseconds timeout = std::chrono::milliseconds(0));
  static constexpr int kAnySource = -1;

  // --- operations on device memory. Streams are cudaStream_t; null: the legacy default stream.
  // ----
  /// Readies a device for operations. The first call is collective: staging is made and the ranks
  /// exchange handles; then operations run on `stream` (null: one of the library's own). Later
  /// calls for the same device return at once, and another device is a UsageError. Throws
  /// UsageError ("no CUDA device: ...") where there is none, on all ranks. `interrupted` is as in
  /// Operation.
  void open_device(int device, void* stream, const std::function<bool()>& interrupted = {});
  /// Throws UsageError for what runs on the CPU only: gather, scatter, all_to_all, and blocks of
  /// unequal size. Sends nothing; enqueue() asks, too.
  void check_on_device(const Operation& operation) const;
  /// Gives the operation, whose buffers are device memory, to the stream of the open device, behind
  /// all that `caller` has been given so far. Never blocks the host; an error that came meanwhile
  /// is thrown, as is a UsageError for what the device does not support. Barrier is for run() only.
  /// Buffers stay alive until complete(). Returns a ticket, from 1, in order.
  uint64_t enqueue(const Operation& operation, void* caller);
  /// Lets `caller` wait, on the device, for the operation and all before it.
  void join(uint64_t ticket, void* caller);
  /// True once the device is through with the operation, also after a failure. From then on
  /// failure() tells if the ranks disagreed about it.
  bool complete(uint64_t ticket) const;
  /// The error that ended the communicator, as a wait for an operation would give it; null as long
  /// as there is none.
  std::exception_ptr failure() const;

  /// To be called before a thread blocks until an operation is complete, other than in run() and
  /// Work::wait(): if it is in a callback of a work, another thread goes on with the operations.
  static void about_to_block();

  /// The name of the algorithm and the wire format that the operation would use, for explain(). Its
  /// buffers do not matter.
  std::pair<std::string, WireFormat> choice(const Operation& operation) const;

  CommunicatorStats stats() const;

  /// The default time limit of operations that are given from now on.
  void set_timeout(std::chrono::milliseconds timeout);

  /// Ends all waits on every rank with a PeerError of this message. From any thread; never blocks.
  void abort(const std::string& message);
  /// Waits for nothing and for nobody: operations in flight end with an error. Idempotent.
  void close();

 private:
  struct Impl;
  std::shared_ptr<Impl> impl_;
};

}  // namespace dpcomm
