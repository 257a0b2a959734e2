// dpcomm as a backend of torch.distributed: collectives over a Communicator, on tensors on the CPU
// and on one device.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <vector>

#include "comm/communicator.h"
#include "torch/call.h"

namespace dpcomm {

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
  uint64_t getSequenceNumberForGroup() override { return sequence_; }
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

  // Not there yet: UsageError.
  WorkPointer allreduce_sparse(Tensors&, const c10d::AllreduceOptions&) override;
  WorkPointer gather(std::vector<Tensors>&, Tensors&, const c10d::GatherOptions&) override;
  WorkPointer scatter(Tensors&, std::vector<Tensors>&, const c10d::ScatterOptions&) override;
  WorkPointer alltoall(Tensors&, Tensors&, const c10d::AllToAllOptions&) override;
  WorkPointer alltoall_base(at::Tensor&, at::Tensor&, std::vector<int64_t>&, std::vector<int64_t>&,
                            const c10d::AllToAllOptions&) override;
  WorkPointer send(Tensors&, int, int) override;
  WorkPointer recv(Tensors&, int, int) override;
  WorkPointer recvAnysource(Tensors&, int) override;
  void monitoredBarrier(const c10d::BarrierOptions&, bool) override;

  const Communicator& communicator() const { return *communicator_; }
  /// Leaves every group that is still there, for the exit of the interpreter.
  static void shutdown_all();

 private:
  /// Builds a call by `build` and runs or launches it; translates what either throws.
  template <class Opts, class Build>
  WorkPointer start(c10d::OpType type, const char* title, const Opts& opts, Build&& build);

  void run_here(Call& call);
  WorkPointer start_on_device(Call&& call, uint64_t sequence);
  /// The communication stream on a device; the first call connects the devices of all ranks.
  c10::Stream device_stream(c10::Device device);
  void synchronize_device();

  std::shared_ptr<Communicator> communicator_;
  std::mutex device_mutex_;
  std::optional<c10::Stream> device_stream_;  // under device_mutex_
  std::atomic<uint64_t> sequence_{0};
};

}  // namespace dpcomm
