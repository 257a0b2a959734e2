// The CPU reader of schedules: runs their steps over channels, the wire format fused into the
// reduction. It knows bytes, dtypes and waiting; what is sent to whom is the schedule's affair.
#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <functional>
#include <string>
#include <vector>

#include "base/clock.h"
#include "cpu/blocks.h"
#include "cpu/diagnosis.h"
#include "cpu/operation_watch.h"
#include "cpu/progress.h"
#include "cpu/task.h"
#include "schedule/cut.h"
#include "schedule/registry.h"
#include "schedule/step.h"
#include "transport/channel.h"
#include "wire/codec.h"

namespace dpcomm {

class Executor {
 public:
  /// Uses the transport alone, from one thread at a time. `interrupted`, once set (and the
  /// transport woken), ends a run with a PeerError.
  Executor(Transport& transport, const WaitPolicy& policy, const std::atomic<bool>& interrupted);

  /// Runs the task to its end on this rank. Throws PeerError, TimeoutError, or UsageError where the
  /// ranks disagree; after a throw nothing more is published and the channels are not usable.
  void run(const Task& task);

  uint64_t wire_bytes() const { return wire_bytes_; }
  uint64_t wait_ns() const { return wait_ns_; }

 private:
  /// Where a step's slice lies.
  struct Slice {
    size_t elems = 0;
    size_t wire_bytes = 0;           ///< of the slice on a channel
    uint32_t tag = 0;                ///< of its message
    const std::byte* own = nullptr;  ///< in the input
    std::byte* output = nullptr;
  };

  template <class Schedule>
  void drive(const ScheduleParams& params);
  bool try_step(const Step& step, size_t round);
  bool is_left_out(const Slice& slice, size_t round) const;
  bool ready(const Step& step);
  Range range_of(const Step& step, size_t round, const Block& block) const;
  Slice locate(const Step& step, size_t round) const;
  void check_message(int peer, const Message& message, const Slice& slice) const;
  void check_block(int peer, const Message& message, const Slice& slice) const;
  void perform(const Step& step, const Slice& slice);
  void send_own(const Step& step, const Slice& slice);
  void receive(const Step& step, const Slice& slice);
  void reduce(const Step& step, const Slice& slice);
  void sum_contributions(const Step& step, const Slice& slice);
  void reduce_tile(const Step& step, const Slice& slice, size_t first, size_t n);
  const std::byte* own_contribution(const Step& step, const Slice& slice, size_t first, size_t n);
  void order_contributions(const Step& step);
  void copy_to_other_slots(const Step& step, size_t bytes);

  // Asked by a wait that lasts (executor_wait.cc).
  void find_reason(const std::vector<const Step*>& waiting);
  std::vector<int> blocking_peers(const std::vector<const Step*>& waiting);

  RecvChannel& recv_channel(int peer, int lane) { return *recv_[size_t(lane) * world_ + peer]; }
  SendChannel& send_channel(int peer, int lane) { return *send_[size_t(lane) * world_ + peer]; }

  Transport& transport_;
  OperationWatch watch_;
  const WaitPolicy policy_;
  const WaitPolicy patient_policy_;
  const std::atomic<bool>& interrupted_;
  const int rank_;
  const int world_;
  const Isa isa_;
  const SumF32 sum_f32_;
  std::vector<RecvChannel*> recv_;  // by lane, then peer; null for the rank itself
  std::vector<SendChannel*> send_;

  // Of the task that runs.
  const Task* task_ = nullptr;
  uint32_t tag_ = 0;
  bool lossy_ = false;
  bool premultiplied_ = false;
  size_t elem_bytes_ = 0;
  Blocks blocks_;
  Cut cut_;
  Partition partition_{0, 1, 1, 1, 1, false};  // of the tensor, or of the largest block
  const Codec* tensor_ = nullptr;              // how the tensor's elements lie in memory
  const Codec* wire_ = nullptr;                // how they lie in a slot
  const Codec* accumulator_ = nullptr;         // how they lie in a tile
  const AccumulatorOps* arithmetic_ = nullptr;

  // Of the step that runs, by position in its peers.
  std::vector<Message> messages_;
  std::vector<std::byte*> slots_;
  std::vector<int> order_;  // positions in messages_ by ascending rank; -1 is the own contribution
  std::vector<const float*> sources_;
  std::vector<float*> destinations_;
  std::vector<std::byte> tile_, own_tile_, own_slice_;

  uint64_t wire_bytes_ = 0;
  uint64_t wait_ns_ = 0;
};

}  // namespace dpcomm
