// dpcomm as a backend of torch.distributed: collectives and messages over a Communicator, on
// tensors on the CPU and, of the collectives, on one device.
#pragma once

#include <c10/util/FunctionRef.h>

#include <atomic>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/Store.hpp>
#include <unordered_map>
#include <vector>

#include "comm/communicator.h"
#include "torch/call.h"
#include "torch/completions.h"

namespace dpcomm {

/// The options of a group where torch wants some of its own kind.
struct GroupOptions final : c10d::Backend::Options {
  explicit GroupOptions(CommunicatorOptions chosen)
      : Options("dpcomm", chosen.timeout), communicator(std::move(chosen)) {}

  /// What a group with these options takes: `timeout`, which torch writes, where none was chosen.
  CommunicatorOptions of_group() const {
    CommunicatorOptions options = communicator;
    if (!timeout_chosen) options.timeout = timeout;
    return options;
  }
  virtual c10::intrusive_ptr<Options> clone() const {  // overrides from torch 2.14 on
    return c10::make_intrusive<GroupOptions>(*this);
  }

  CommunicatorOptions communicator;
  bool timeout_chosen = false;
};

/// A process group. Calls may come from any thread; they run in the order in which they are given,
/// which has to be the same on every rank. A synchronous call (opts.asyncOp false) runs in the
/// caller's thread if the group is idle and returns no work, as torch's NCCL backend does: it is
/// complete. An asynchronous one returns at once. On a device no call blocks the host (but for the
/// first, which connects the devices, and barrier()): the current stream waits instead, in a
/// synchronous call at once, else in wait(). Errors are those of csrc/base/error.h, translated for
/// Python; those of operations on a device come with wait() or with a later call.
class ProcessGroupDpcomm final : public c10d::Backend {
 public:
  using WorkPointer = c10::intrusive_ptr<c10d::Work>;
  using Tensors = std::vector<at::Tensor>;

  /// Meets the other ranks through `store`; collective. Throws TimeoutError naming the ranks that
  /// did not come.
  ProcessGroupDpcomm(const c10::intrusive_ptr<c10d::Store>& store, int rank, int size,
                     const std::string& group_name, CommunicatorOptions options);
  ~ProcessGroupDpcomm() override;

  const std::string getBackendName() const override { return "dpcomm"; }
  void setTimeout(std::chrono::milliseconds timeout) override;
  void setSequenceNumberForGroup() override {}  // every rank counts from zero
  /// Collectives so far; messages do not count, as their number differs from rank to rank.
  uint64_t getSequenceNumberForGroup() override { return sequence_; }
  /// What ended the group, if anything.
  c10d::ErrorType getError() override;
  /// Ends all waits, on every rank, with a PeerError.
  void abort() override;
  /// Leaves the group and waits for nobody; calls still in flight end with an error.
  void shutdown() override;

  WorkPointer allreduce(Tensors& tensors, const c10d::AllreduceOptions& opts) override;
  WorkPointer allreduce_coalesced(Tensors& tensors,
                                  const c10d::AllreduceCoalescedOptions& opts) override;
  WorkPointer reduce(Tensors& tensors, const c10d::ReduceOptions& opts) override;
  WorkPointer broadcast(Tensors& tensors, const c10d::BroadcastOptions& opts) override;
  WorkPointer allgather(std::vector<Tensors>& outputs, Tensors& inputs,
                        const c10d::AllgatherOptions& opts) override;
  WorkPointer allgather_coalesced(std::vector<Tensors>& outputs, Tensors& inputs,
                                  const c10d::AllgatherOptions& opts) override;
  WorkPointer _allgather_base(at::Tensor& output, at::Tensor& input,
                              const c10d::AllgatherOptions& opts) override;
  WorkPointer allgather_into_tensor_coalesced(Tensors& outputs, Tensors& inputs,
                                              const c10d::AllgatherOptions& opts) override;
  WorkPointer reduce_scatter(Tensors& outputs, std::vector<Tensors>& inputs,
                             const c10d::ReduceScatterOptions& opts) override;
  WorkPointer _reduce_scatter_base(at::Tensor& output, at::Tensor& input,
                                   const c10d::ReduceScatterOptions& opts) override;
  WorkPointer reduce_scatter_tensor_coalesced(Tensors& outputs, Tensors& inputs,
                                              const c10d::ReduceScatterOptions& opts) override;
  /// The host waits, in this call, until its current and its communication stream are through, so
  /// that no rank leaves before the device work of all others is done.
  WorkPointer barrier(const c10d::BarrierOptions& opts) override;
  /// Connects the devices of all ranks; collective.
  void eagerConnectSingleDevice(at::Device device) override;

  /// The shapes are exchanged first, for which the call waits; the rest is as asynchronous as
  /// asked.
  WorkPointer allreduce_sparse(Tensors& tensors, const c10d::AllreduceOptions& opts) override;
  WorkPointer gather(std::vector<Tensors>& outputs, Tensors& inputs,
                     const c10d::GatherOptions& opts) override;
  WorkPointer scatter(Tensors& outputs, std::vector<Tensors>& inputs,
                      const c10d::ScatterOptions& opts) override;
  WorkPointer alltoall(Tensors& outputs, Tensors& inputs,
                       const c10d::AllToAllOptions& opts) override;
  WorkPointer alltoall_base(at::Tensor& output, at::Tensor& input,
                            std::vector<int64_t>& output_splits, std::vector<int64_t>& input_splits,
                            const c10d::AllToAllOptions& opts) override;
  /// barrier() in the caller's thread; its TimeoutError names all ranks that have not come, with
  /// and without `wait_all_ranks`.
  void monitoredBarrier(const c10d::BarrierOptions& opts, bool wait_all_ranks) override;

  // Messages (process_group_p2p.cc): always asynchronous, beside the collectives.
  WorkPointer send(Tensors& tensors, int peer, int tag) override;
  WorkPointer recv(Tensors& tensors, int peer, int tag) override;
  WorkPointer recvAnysource(Tensors& tensors, int tag) override;
  /// From startCoalescing() to endCoalescing(), which gives one work for them, asynchronous calls
  /// of this thread are noted; nothing else changes. Not announced by supportsCoalescing(), so that
  /// batch_isend_irecv gives the work of each message.
  void startCoalescing() override;
  WorkPointer endCoalescing() override;

  // Groups from this one (process_group_groups.cc). Members meet through the store; null for a
  // rank that is no member.
  using BackendPointer = c10::intrusive_ptr<c10d::Backend>;
  using OptionsPointer = c10::intrusive_ptr<c10d::Backend::Options>;
  bool supportsSplitting() const override { return true; }
  bool supportsShrinking() const override { return true; }
  /// A copy, with the time limit in force.
  OptionsPointer getBackendOptions() override;
  BackendPointer split(const c10::intrusive_ptr<c10d::Store>& store, const std::vector<int>& ranks,
                       const OptionsPointer& opts) override;
  BackendPointer merge(const c10::intrusive_ptr<c10d::Store>& store, const OptionsPointer& opts,
                       const int& rank, const int& size) override;
  /// Called by the ranks that stay. Flag 1: this group is aborted first.
  BackendPointer shrink(const std::vector<int64_t>& ranks_to_exclude, int flags,
                        const OptionsPointer& opts) override;

  /// `hook` is called after each call on CPU tensors that succeeded, in the thread that ran it.
  void registerOnCompletionHook(
      std::function<void(std::shared_ptr<c10d::WorkInfo>)>&& hook) override;
  /// Waits for all calls that are on their way, their hooks included, and for the device.
  void waitForPendingWorks() override;
  void enableCollectivesTiming() override {}  // works always know their duration

  bool supportsTensorAlloc(c10::DeviceIndex) override { return true; }
  /// Memory as torch gives it: dpcomm has no pool that would be faster.
  at::Tensor allocateTensor(long size, at::TensorOptions options) override;

  // What torch 2.14 added. No "override", so that the same source compiles for those before.
  virtual WorkPointer gather_single(at::Tensor& output, at::Tensor& input,
                                    const c10d::GatherOptions& opts);

  // Not there: UsageError.
  std::shared_ptr<c10::Allocator> getMemAllocator() override;
  void suspend() override;
  void resume() override;
  std::unordered_map<std::string, uint64_t> getMemoryStats() override;

  const Communicator& communicator() const { return *communicator_; }
  /// Leaves every group that is still there, for the exit of the interpreter.
  static void shutdown_all();

 private:
  /// Builds a call by `build` and runs or launches it; translates what either throws.
  WorkPointer start_call(c10d::OpType type, const char* title, bool async,
                         std::chrono::milliseconds timeout, c10::function_ref<void(Call&)> build);
  template <class Opts>
  WorkPointer start(c10d::OpType type, const char* title, const Opts& opts,
                    c10::function_ref<void(Call&)> build) {
    return start_call(type, title, opts.asyncOp, opts.timeout, build);
  }

  [[noreturn]] void refuse(const OwnUsageError& reason);
  void run_here(Call& call, uint64_t sequence);
  void add_to_window(const WorkPointer& work);
  /// A group of `ranks` of this one, whose options come from `opts`, or else are those of this one.
  BackendPointer derive(const c10::intrusive_ptr<c10d::Store>& store, const std::vector<int>& ranks,
                        const std::string& name, const OptionsPointer& opts);
  WorkPointer start_on_device(Call&& call, uint64_t sequence);
  /// The communication stream on a device; the first call connects the devices of all ranks.
  c10::Stream device_stream(c10::Device device);
  void synchronize_device();

  std::shared_ptr<Communicator> communicator_;
  std::mutex device_mutex_;
  std::optional<c10::Stream> device_stream_;  // under device_mutex_
  std::atomic<uint64_t> sequence_{0}, messages_{0};
  std::atomic<int64_t> timeout_{0};  // milliseconds
  const std::shared_ptr<Completions> completions_ = std::make_shared<Completions>();

  /// What startCoalescing() opens.
  struct Window {
    std::thread::id thread;
    std::vector<WorkPointer> works;
  };
  std::mutex window_mutex_;
  std::optional<Window> window_;          // under window_mutex_
  std::atomic<bool> window_open_{false};  // so that most calls need not lock

  const std::string group_name_;
  std::mutex store_mutex_;
  c10::intrusive_ptr<c10d::Store> store_;  // under store_mutex_; null after shutdown()
  /// The last split, as torch asks once for each device type.
  struct Split {
    c10::intrusive_ptr<c10d::Store> store;
    std::vector<int> ranks;
    c10::weak_intrusive_ptr<c10d::Backend> backend;
  };
  std::optional<Split> last_split_;  // under store_mutex_
};

}  // namespace dpcomm
