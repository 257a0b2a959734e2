// The handles that torch holds of asynchronous calls.
#pragma once

#include <ATen/core/ivalue.h>

#include <memory>
#include <torch/csrc/distributed/c10d/Work.hpp>
#include <vector>

#include "base/fork.h"
#include "comm/communicator.h"
#include "torch/call.h"
#include "torch/completions.h"

namespace dpcomm {

/// Complete when all operations of its call are, and their results lie in the tensors. Members may
/// be called from any thread. Keeps itself and the call's tensors alive until then; afterwards only
/// the results, which result() and the future give.
class TorchWork final : public c10d::Work {
 public:
  /// Hands the operations of `call`, or its message, to the communicator. Throws what submit()
  /// throws.
  static c10::intrusive_ptr<TorchWork> launch(Communicator& communicator,
                                              std::shared_ptr<Completions> completions, Call&& call,
                                              uint64_t sequence);

  TorchWork(int rank, std::shared_ptr<Completions> completions, Call&& call, uint64_t sequence);

  /// Returns true once complete; throws the error it ended with. A positive `timeout` that runs out
  /// gives dpcomm's TimeoutError, and the call goes on; so does a signal that Python turns into an
  /// exception, such as Ctrl-C.
  bool wait(std::chrono::milliseconds timeout = kNoTimeout) override;
  /// The tensors of the call, one list. Throws UsageError before it is complete.
  std::vector<at::Tensor> result() override;
  /// A future of the same list. Its callbacks run in the thread that completes it, or in the
  /// caller's if it is complete.
  c10::intrusive_ptr<c10::ivalue::Future> getFuture() override;
  uint64_t getSequencenumber() const override { return sequence_; }
  /// Of a message that was received: the rank that sent it. Else -1.
  int sourceRank() const override;
  /// Milliseconds that the call took; of a collective, from when those before it were complete.
  float getDuration() const override;

 private:
  void submit(Communicator& communicator);
  void complete();
  void complete_future();

  Call call_;
  const uint64_t sequence_;
  const std::shared_ptr<Completions> completions_;
  Completions::Began began_;
  std::chrono::duration<float> duration_{0};  // written before completed_
  const uint32_t generation_ = fork_generation();
  std::vector<std::shared_ptr<dpcomm::Work>> parts_;  // one for each operation, in order
  c10::intrusive_ptr<c10::ivalue::Future> future_;    // under mutex_
  bool future_complete_ = false;                      // under mutex_
};

/// Several works as one, complete when all are. Fails with the error of the first that failed.
class CoalescedWork final : public c10d::Work {
 public:
  CoalescedWork(int rank, std::vector<c10::intrusive_ptr<c10d::Work>> works)
      : c10d::Work(rank, c10d::OpType::COALESCED), works_(std::move(works)) {}

  bool isCompleted() override;
  bool isSuccess() const override { return exception() == nullptr; }
  std::exception_ptr exception() const override;
  bool wait(std::chrono::milliseconds timeout = kNoTimeout) override;
  void synchronize() override;
  void blockCurrentStream() override { synchronize(); }
  /// Those of all works.
  std::vector<at::Tensor> result() override;
  c10::intrusive_ptr<c10::ivalue::Future> getFuture() override;

 private:
  const std::vector<c10::intrusive_ptr<c10d::Work>> works_;
};

}  // namespace dpcomm
