// Calls on device memory: through torch's interface of any device, so that nothing here knows CUDA.
//
//   caller's stream   ... -- op --\                       /-- join: reads the results
//   communication stream           \-- kernels -- copies --- event of the future
//
// The host waits nowhere, but for a wait with a time limit.
#pragma once

#include <ATen/core/ivalue.h>
#include <c10/core/Event.h>
#include <c10/core/Stream.h>

#include <atomic>
#include <memory>
#include <optional>
#include <torch/csrc/distributed/c10d/Work.hpp>
#include <vector>

#include "base/fork.h"
#include "comm/communicator.h"
#include "torch/call.h"

namespace dpcomm {

/// The end of a launched call on the communication stream.
class DeviceEnd {
 public:
  /// Gives the operations of `call` to `stream`, behind what the current stream has been given, and
  /// the copies of finish() behind them. Throws what enqueue() throws; the current stream waits
  /// then for what was given before.
  static DeviceEnd launch(Communicator& communicator, const c10::Stream& stream, Call& call);

  /// Lets the stream that is current now wait for the end. Blocks nobody.
  void join(Communicator& communicator) const;
  bool complete(const Communicator& communicator) const;

 private:
  explicit DeviceEnd(const c10::Stream& stream) : stream_(stream) {}

  c10::Stream stream_;
  uint64_t ticket_ = 0;               // 0: there was nothing to do
  std::optional<c10::Event> copied_;  // behind the copies, if there are any
};

/// The handle that torch holds of an asynchronous call on a device. Members may be called from any
/// thread. The tensors of the call may be freed at any time; its results live as long as the
/// handle.
class DeviceWork final : public c10d::Work {
 public:
  static c10::intrusive_ptr<DeviceWork> launch(std::shared_ptr<Communicator> communicator,
                                               const c10::Stream& stream, Call&& call,
                                               uint64_t sequence);

  DeviceWork(std::shared_ptr<Communicator> communicator, DeviceEnd&& end, const Call& call,
             uint64_t sequence);

  /// True once the device is through with the call, also after a failure. Never blocks.
  bool isCompleted() override;
  bool isSuccess() const override;
  /// The error that ended the group before this call was complete; null as long as there is none.
  std::exception_ptr exception() const override;
  /// Lets the current stream wait for the call, and returns true at once; throws the error that has
  /// ended the group by now. With a positive `timeout` it blocks the host, until the call is
  /// complete, the group has failed, or a TimeoutError after that time, and the call goes on.
  bool wait(std::chrono::milliseconds timeout = kNoTimeout) override;
  void synchronize() override;
  void blockCurrentStream() override { synchronize(); }
  /// The tensors of the call; to be used on a stream that waits for it.
  std::vector<at::Tensor> result() override { return results_; }
  /// Complete from the start: its value is ordered by the streams of those who use it.
  c10::intrusive_ptr<c10::ivalue::Future> getFuture() override { return future_; }
  uint64_t getSequencenumber() const override { return sequence_; }

 private:
  void check_owner() const;
  void wait_on_host(std::chrono::milliseconds timeout);

  std::shared_ptr<Communicator> communicator_;
  DeviceEnd end_;
  const char* title_;
  const std::vector<at::Tensor> results_;
  const uint64_t sequence_;
  const uint32_t generation_ = fork_generation();
  c10::intrusive_ptr<c10::ivalue::Future> future_;
  mutable std::atomic<bool> succeeded_{false};  // seen complete while the group had no failure
};

}  // namespace dpcomm
