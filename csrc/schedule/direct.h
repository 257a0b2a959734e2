// Direct broadcast, reduce, all-gather and reduce-scatter: every byte goes in one hop.
//
// 4 ranks; what each rank sends, and what it then receives (+ add, = keep):
//
//   broadcast, root 1     rank 1: c0 to 0, 2, 3 and =    others: c0 from 1 =
//   reduce, root 1        others: c0 to 1                rank 1: c0 from 0, 2, 3 +=
//   all-gather            rank r: c_r to all others, =   then c_{r+1}, c_{r+2}, c_{r+3} =
//   reduce-scatter        rank r: c_p to p = r+1, r+2, r+3   then c_r from all others +=
//
// A reduction adds in the order of ranks, so the sum has the same bits as in a two-shot all-reduce,
// of which reduce-scatter and all-gather are the two halves.
//
// Steps: all-gather and reduce-scatter N, broadcast and reduce 1. Bytes sent per rank: (N - 1) / N
// S (S is the larger tensor); broadcast (N - 1) S at the root, reduce S at the others. Slots: 1,
// since a channel carries one message per slice. Roundings on a lossy wire: 1, whatever N (the own
// contribution has none). Invariant: a rank reads its input of chunk c before it writes its output
// of chunk c. Source: the linear algorithms of Thakur, Rabenseifner, Gropp (2005).
#pragma once

#include "schedule/step.h"

namespace dpcomm {

/// What the four share: lanes, slots, and the neighbour at a distance.
class DirectWalk {
 public:
  static constexpr int kLanes = 1;
  static constexpr int kFirstLane = 0;
  static constexpr int kChannelLanes = 1;
  DPCOMM_HD static constexpr int min_slots(const ScheduleParams&) { return 1; }

 protected:
  DPCOMM_HD explicit DirectWalk(const ScheduleParams& params)
      : rank_(params.rank), world_(params.world), root_(params.root), slices_(params.slices) {}

  /// Starts the step at (index_, slice_) and moves on, through `per_slice` steps for each slice;
  /// false when all are taken.
  DPCOMM_HD bool take(Step& step, int32_t per_slice, int32_t& index) {
    if (slice_ == slices_) return false;
    step = Step();
    step.slice = slice_;
    index = index_;
    if (++index_ == per_slice) {
      index_ = 0;
      ++slice_;
    }
    return true;
  }
  DPCOMM_HD int32_t neighbour(int32_t distance) const {
    const int32_t to = rank_ + distance;
    return to < world_ ? to : to - world_;
  }
  DPCOMM_HD Peers others() const { return Peers::others(rank_, world_); }
  /// `flags` where there is anybody else, else none.
  DPCOMM_HD unsigned with_others(unsigned flags) const { return only_if(world_ > 1, flags); }

  int32_t rank_, world_, root_, slices_;
  int32_t index_ = 0;
  int32_t slice_ = 0;
};

class DirectBroadcast : public DirectWalk {
 public:
  DPCOMM_HD static constexpr int chunks(const ScheduleParams&) { return 1; }
  DPCOMM_HD static constexpr int roundings(const ScheduleParams&) { return 0; }
  DPCOMM_HD DirectBroadcast(const ScheduleParams& params, int /*lane*/) : DirectWalk(params) {}

  DPCOMM_HD bool next(Step& step) {
    int32_t index;
    if (!take(step, 1, index)) return false;
    if (rank_ == root_) {
      step.primitive = static_cast<uint8_t>(kCopy | with_others(kSend));
      step.send_peers = others();
    } else {
      step.primitive = kRecv | kCopy;
      step.recv_peers = Peers::one(root_);
    }
    return true;
  }
};

class DirectReduce : public DirectWalk {
 public:
  DPCOMM_HD static constexpr int chunks(const ScheduleParams&) { return 1; }
  DPCOMM_HD static constexpr int roundings(const ScheduleParams& params) {
    return params.world > 1;
  }
  DPCOMM_HD DirectReduce(const ScheduleParams& params, int /*lane*/) : DirectWalk(params) {}

  DPCOMM_HD bool next(Step& step) {
    int32_t index;
    if (!take(step, 1, index)) return false;
    if (rank_ == root_) {
      step.primitive = static_cast<uint8_t>(kCopy | with_others(kRecv | kReduce));
      step.recv_peers = others();
    } else {
      step.primitive = kSend;
      step.send_peers = Peers::one(root_);
    }
    return true;
  }
};

class DirectAllGather : public DirectWalk {
 public:
  DPCOMM_HD static constexpr int chunks(const ScheduleParams& params) { return params.world; }
  DPCOMM_HD static constexpr int roundings(const ScheduleParams&) { return 0; }
  DPCOMM_HD DirectAllGather(const ScheduleParams& params, int /*lane*/) : DirectWalk(params) {}

  DPCOMM_HD bool next(Step& step) {
    int32_t index;
    if (!take(step, world_, index)) return false;
    step.chunk = neighbour(index);
    if (index == 0) {
      step.primitive = static_cast<uint8_t>(kCopy | with_others(kSend));
      step.send_peers = others();
    } else {
      step.primitive = kRecv | kCopy;
      step.recv_peers = Peers::one(step.chunk);
    }
    return true;
  }
};

class DirectReduceScatter : public DirectWalk {
 public:
  DPCOMM_HD static constexpr int chunks(const ScheduleParams& params) { return params.world; }
  DPCOMM_HD static constexpr int roundings(const ScheduleParams& params) {
    return params.world > 1;
  }
  DPCOMM_HD DirectReduceScatter(const ScheduleParams& params, int /*lane*/) : DirectWalk(params) {}

  DPCOMM_HD bool next(Step& step) {
    int32_t index;
    if (!take(step, world_, index)) return false;
    if (index < world_ - 1) {
      step.primitive = kSend;
      step.chunk = neighbour(index + 1);
      step.send_peers = Peers::one(step.chunk);
    } else {
      step.primitive = static_cast<uint8_t>(kCopy | with_others(kRecv | kReduce));
      step.chunk = rank_;
      step.recv_peers = others();
    }
    return true;
  }
};

}  // namespace dpcomm
