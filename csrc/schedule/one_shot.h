// One-shot all-reduce: everybody sends everything to everybody, and everybody adds.
//
//           to rank 0   1   2   3
//   rank 0          .   x0  x0  x0        each rank then has x0, x1, x2, x3
//   rank 1          x1  .   x1  x1        and adds them in the order of ranks
//   rank 2          x2  x2  .   x2
//   rank 3          x3  x3  x3  .
//
// 4 ranks, chunk 0 is the whole round: send x_r to the 3 others; receive 3, add, keep.
//
// Steps: 2. Bytes sent per rank: (N - 1) S, which only small messages can afford.
// Slots: 1, since a channel carries one message per slice.
// Roundings on a lossy wire: 1. Every rank reduces, so the own contribution is added as the others
// got it (own_as_sent), or the sums would differ.
// Invariant: a rank has sent its input before it writes its output. Source: the linear all-to-all
// form in Thakur, Rabenseifner, Gropp (2005).
#pragma once

#include "schedule/step.h"

namespace dpcomm {

class OneShotAllReduce {
 public:
  static constexpr int kLanes = 1;
  static constexpr int kFirstLane = 0;
  static constexpr int kChannelLanes = 1;

  DPCOMM_HD static constexpr int chunks(const ScheduleParams&) { return 1; }
  DPCOMM_HD static constexpr int min_slots(const ScheduleParams&) { return 1; }
  DPCOMM_HD static constexpr int roundings(const ScheduleParams&) { return 1; }

  DPCOMM_HD OneShotAllReduce(const ScheduleParams& params, int /*lane*/)
      : rank_(params.rank), world_(params.world), slices_(params.slices) {}

  DPCOMM_HD bool next(Step& step) {
    if (slice_ == slices_) return false;
    step = Step();
    step.slice = slice_;
    if (world_ == 1) {
      step.primitive = kCopy;
      ++slice_;
    } else if (!sent_) {
      step.primitive = kSend;
      step.send_peers = Peers::others(rank_, world_);
      sent_ = true;
    } else {
      step.primitive = kRecv | kReduce | kCopy;
      step.recv_peers = Peers::others(rank_, world_);
      step.own_as_sent = true;
      sent_ = false;
      ++slice_;
    }
    return true;
  }

 private:
  int32_t rank_, world_, slices_;
  int32_t slice_ = 0;
  bool sent_ = false;
};

}  // namespace dpcomm
