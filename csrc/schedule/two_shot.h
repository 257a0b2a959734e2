// Two-shot all-reduce: a direct reduce-scatter, then a direct all-gather.
//
//           to rank 0   1   2   3                 from rank 0   1   2   3
//   shot 1  rank 0  .   c1  c2  c3        shot 2  rank 0    .   c1  c2  c3
//           rank 1  c0  .   c2  c3                rank 1    c0  .   c2  c3
//           rank 2  c0  c1  .   c3                rank 2    c0  c1  .   c3
//           rank 3  c0  c1  c2  .                 rank 3    c0  c1  c2  .
//
// Chunk c belongs to rank c, which receives every other rank's contribution to it, adds all in the
// order of ranks, keeps the result as it goes on the wire and sends it to all.
//
// For 4 ranks, rank 1 does: send c2, c3, c0; receive c1 of 0, 2, 3, add, keep, send to all; receive
// and keep c2, c3, c0.
//
// Steps: 2N - 1 (N - 1 sends, one reduction, N - 1 receipts). Bytes sent per rank: 2 (N - 1) / N S.
// Slots: 2, since shot 1 and shot 2 share a channel; a channel r -> p carries c_p, then c_r.
// Roundings on a lossy wire: 2, whatever N. Invariant: a rank reads its input of chunk c before it
// writes its output of chunk c. Source: Thakur, Rabenseifner, Gropp (2005), the direct form of
// reduce-scatter + all-gather.
#pragma once

#include "schedule/step.h"

namespace dpcomm {

class TwoShotAllReduce {
 public:
  static constexpr int kLanes = 1;
  static constexpr int kFirstLane = 0;
  static constexpr int kChannelLanes = 1;

  DPCOMM_HD static constexpr int chunks(const ScheduleParams& params) { return params.world; }
  DPCOMM_HD static constexpr int min_slots(const ScheduleParams&) { return 2; }
  DPCOMM_HD static constexpr int roundings(const ScheduleParams&) { return 2; }

  DPCOMM_HD TwoShotAllReduce(const ScheduleParams& params, int /*lane*/)
      : rank_(params.rank), world_(params.world), slices_(params.slices) {}

  DPCOMM_HD bool next(Step& step) {
    if (slice_ == slices_) return false;
    step = Step();
    step.slice = slice_;
    if (world_ == 1) {
      step.primitive = kCopy;
    } else if (index_ < world_ - 1) {  // shot 1, starting at the right-hand neighbour
      step.primitive = kSend;
      step.chunk = neighbour(index_ + 1);
      step.send_peers = Peers::one(step.chunk);
    } else if (index_ == world_ - 1) {
      step.primitive = kRecv | kReduce | kCopy | kSend;
      step.chunk = rank_;
      step.recv_peers = step.send_peers = Peers::others(rank_, world_);
    } else {
      step.primitive = kRecv | kCopy;
      step.chunk = neighbour(index_ - world_ + 1);
      step.recv_peers = Peers::one(step.chunk);
    }
    advance();
    return true;
  }

 private:
  DPCOMM_HD int32_t neighbour(int32_t distance) const {
    const int32_t to = rank_ + distance;
    return to < world_ ? to : to - world_;
  }
  DPCOMM_HD void advance() {
    if (++index_ == 2 * world_ - 1) {
      index_ = 0;
      ++slice_;
    }
  }

  int32_t rank_, world_, slices_;
  int32_t index_ = 0;
  int32_t slice_ = 0;
};

}  // namespace dpcomm
