// Tree all-gather and reduce-scatter: N binomial trees, one per chunk, each rotated to its rank.
//
// In the tree of chunk c, rank r has number v = (r - c) mod N. The parent of v is v without its
// lowest set bit; the children of v are v + 1, v + 2, v + 4 ... below its lowest set bit:
//
//   numbers, N = 8      0 -> 1, 2, 4       2 -> 3       4 -> 5, 6       6 -> 7
//
// All-gather for 4 ranks; at time v rank r works on chunk r - v (S send, R receive, = keep):
//
//   time       0                1             2                3
//   rank 0     c0 =S to 1, 2    c3 R= of 3    c2 R=S 2 -> 1    c1 R= of 3
//   rank 1     c1 =S to 2, 3    c0 R= of 0    c3 R=S 3 -> 2    c2 R= of 0
//   rank 2     c2 =S to 3, 0    c1 R= of 1    c0 R=S 0 -> 3    c3 R= of 1
//   rank 3     c3 =S to 0, 1    c2 R= of 2    c1 R=S 1 -> 0    c0 R= of 2
//
// Reduce-scatter is the mirror image in time: v falls from N - 1 to 0, a rank adds what came from
// v + 1, v + 2, v + 4 ... and its own input, sends the sum to v without its lowest bit, and keeps
// it at v = 0, where the chunk is its own.
//
// Steps: N. Bytes sent per rank: (N - 1) / N S, as the ring; but a chunk is through after at most
// ceil(log2 N) hops, and only log2 N channels per rank are used.
// Slots: 1. On the channel to rank r + 2^j the message sent at time v is taken at time v + 2^j, and
// the next one is sent at v + 2^(j+1): in the order of times each channel is empty when it is
// needed. Roundings on a lossy wire: 0 for all-gather, the depth of the tree (the most bits set in
// a number below N) for reduce-scatter. Invariant: a rank writes its own block last
// (reduce-scatter) or first (all-gather). Source: binomial trees as in Bruck et al. (1997); all
// roots at once, lowest bit first, is our own arrangement of it.
#pragma once

#include "schedule/step.h"
#include "schedule/topology.h"

namespace dpcomm {

/// Edges from the root of a binomial tree of `world` nodes to its deepest node: the most bits set
/// in a number below `world`, which has a prefix of world's bits, a zero for its next one, and
/// ones.
DPCOMM_HD constexpr int binomial_depth(int32_t world) {
  int most = 0;
  int set = 0;  // bits of world above `at`
  for (int at = floor_log2(world); at >= 0; --at) {
    if ((world >> at) % 2 == 0) continue;
    most = set + at > most ? set + at : most;
    ++set;
  }
  return most;
}

/// What the two share: chunks, lanes, and the relatives of a number in its tree.
class BinomialWalk {
 public:
  static constexpr int kLanes = 1;
  static constexpr int kFirstLane = 0;
  static constexpr int kChannelLanes = 1;
  DPCOMM_HD static constexpr int chunks(const ScheduleParams& params) { return params.world; }
  DPCOMM_HD static constexpr int min_slots(const ScheduleParams&) { return 1; }

 protected:
  DPCOMM_HD explicit BinomialWalk(const ScheduleParams& params)
      : rank_(params.rank), world_(params.world), slices_(params.slices) {}

  /// Starts the step at (time_, slice_) and moves on; false when all are taken.
  DPCOMM_HD bool take(Step& step, int32_t& time) {
    if (slice_ == slices_) return false;
    step = Step();
    step.slice = slice_;
    time = time_;
    if (++time_ == world_) {
      time_ = 0;
      ++slice_;
    }
    return true;
  }
  DPCOMM_HD int32_t chunk(int32_t v) const { return (rank_ - v + world_) % world_; }
  DPCOMM_HD Peers parent(int32_t v) const {
    return v == 0 ? Peers::none() : Peers::one((rank_ - lowest_bit(v) + world_) % world_);
  }
  DPCOMM_HD Peers children(int32_t v) const {
    const int32_t below = v == 0 ? world_ : lowest_bit(v);
    int32_t count = 0;
    while ((int64_t{1} << count) < below && v + (int64_t{1} << count) < world_) ++count;
    return Peers::powers(rank_, world_, 0, count, +1);
  }

  int32_t rank_, world_, slices_;
  int32_t time_ = 0;
  int32_t slice_ = 0;
};

class TreeAllGather : public BinomialWalk {
 public:
  DPCOMM_HD static constexpr int roundings(const ScheduleParams&) { return 0; }
  DPCOMM_HD TreeAllGather(const ScheduleParams& params, int /*lane*/) : BinomialWalk(params) {}

  DPCOMM_HD bool next(Step& step) {
    int32_t v;
    if (!take(step, v)) return false;
    step.chunk = chunk(v);
    step.recv_peers = parent(v);
    step.send_peers = children(v);
    step.primitive = static_cast<uint8_t>(kCopy | only_if(v > 0, kRecv) |
                                          only_if(!step.send_peers.empty(), kSend));
    return true;
  }
};

class TreeReduceScatter : public BinomialWalk {
 public:
  DPCOMM_HD static constexpr int roundings(const ScheduleParams& params) {
    return binomial_depth(params.world);
  }
  DPCOMM_HD TreeReduceScatter(const ScheduleParams& params, int /*lane*/) : BinomialWalk(params) {}

  DPCOMM_HD bool next(Step& step) {
    int32_t time;
    if (!take(step, time)) return false;
    const int32_t v = world_ - 1 - time;
    step.chunk = chunk(v);
    step.recv_peers = children(v);
    step.send_peers = parent(v);
    step.primitive = static_cast<uint8_t>(only_if(!step.recv_peers.empty(), kRecv | kReduce) |
                                          (v > 0 ? kSend : kCopy));
    return true;
  }
};

}  // namespace dpcomm
