// Ring broadcast and reduce: a chain of ranks that starts or ends at the root, pipelined by slices.
//
//   broadcast from root 1      1 -> 2 -> 3 -> 0        reduce to root 1      2 -> 3 -> 0 -> 1
//
// Broadcast for 4 ranks, root 1, 3 slices (S send, R receive, = keep; a column is a moment):
//
//   rank 1    s0 =S   s1 =S   s2 =S
//   rank 2            s0 R=S  s1 R=S  s2 R=S
//   rank 3                    s0 R=S  s1 R=S  s2 R=S
//   rank 0                            s0 R=   s1 R=   s2 R=
//
// Reduce runs the chain the other way round the root: 2 sends, 3 and 0 add their input and send on,
// 1 adds and keeps. Each rank takes the slices in order, so a chain has no cycle of waits.
//
// Steps: one per slice and rank; a slice is through after N - 1 hops, S bytes after N - 2 + S /
// slot moments. Bytes sent per rank: S (the last: 0). Slots: 1 is safe, 2 let a rank receive while
// it sends. Roundings on a lossy wire: 0 for broadcast, N - 1 for reduce. Invariant: only the root
// of a reduction writes. Source: the pipelined chain of van de Geijn and others, as in Chan,
// Heimlich, Purkayastha, van de Geijn (2007).
#pragma once

#include "schedule/step.h"

namespace dpcomm {

/// What the two share: one chunk, all slices in order, and the distance of a rank behind the root.
class ChainWalk {
 public:
  static constexpr int kLanes = 1;
  static constexpr int kFirstLane = 0;
  static constexpr int kChannelLanes = 1;
  DPCOMM_HD static constexpr int chunks(const ScheduleParams&) { return 1; }
  DPCOMM_HD static constexpr int min_slots(const ScheduleParams&) { return 1; }

 protected:
  DPCOMM_HD explicit ChainWalk(const ScheduleParams& params)
      : rank_(params.rank),
        world_(params.world),
        slices_(params.slices),
        distance_((params.rank - params.root + params.world) % params.world) {}

  DPCOMM_HD bool take(Step& step, bool recv, unsigned middle, bool send) {
    if (slice_ == slices_) return false;
    step = Step();
    step.slice = slice_++;
    step.primitive = static_cast<uint8_t>(only_if(recv, kRecv) | middle | only_if(send, kSend));
    if (recv) step.recv_peers = Peers::one((rank_ + world_ - 1) % world_);
    if (send) step.send_peers = Peers::one((rank_ + 1) % world_);
    return true;
  }

  int32_t rank_, world_, slices_;
  int32_t distance_;  ///< hops from the root to this rank
  int32_t slice_ = 0;
};

class ChainBroadcast : public ChainWalk {
 public:
  DPCOMM_HD static constexpr int roundings(const ScheduleParams&) { return 0; }
  DPCOMM_HD ChainBroadcast(const ScheduleParams& params, int /*lane*/) : ChainWalk(params) {}

  DPCOMM_HD bool next(Step& step) {
    return take(step, distance_ > 0, kCopy, distance_ < world_ - 1);
  }
};

class ChainReduce : public ChainWalk {
 public:
  DPCOMM_HD static constexpr int roundings(const ScheduleParams& params) {
    return params.world - 1;
  }
  DPCOMM_HD ChainReduce(const ScheduleParams& params, int /*lane*/) : ChainWalk(params) {}

  DPCOMM_HD bool next(Step& step) {
    const bool is_root = distance_ == 0;
    const bool recv = is_root ? world_ > 1 : distance_ > 1;
    return take(step, recv, only_if(recv, kReduce) | only_if(is_root, kCopy), !is_root);
  }
};

}  // namespace dpcomm
