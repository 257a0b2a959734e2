// Tree broadcast and reduce: a binary heap of ranks, rotated so that the root is on top.
//
//   8 ranks, root 0              0                  8 ranks, root 3              3
//                            1       2                                       4       5
//                          3   4   5   6                                   6   7   0   1
//                         7                                               2
//
// Broadcast for 4 ranks, root 0 (S send, R receive, = keep; a column is a moment):
//
//   rank 0    s0 =S to 1 and 2    s1 =S ...
//   rank 1                        s0 R=S to 3     s1 ...
//   rank 2                        s0 R=           s1 ...
//   rank 3                                        s0 R=
//
// Reduce is the mirror image: leaves send; inner nodes add what their children sent and their own
// input and send the sum up; the root keeps it.
//
// Steps: one per slice and rank; a slice is through after floor(log2 N) hops. Bytes sent per rank:
// 2 S at an inner node of a broadcast, S at every rank but the root of a reduction. Slots: 1 is
// safe (a tree has no cycle), 2 let a rank receive while it sends. Roundings on a lossy wire: 0 for
// broadcast, floor(log2 N) for reduce. Invariant: only the root of a reduction writes. Source:
// folklore; see Knuth on heaps for the shape.
#pragma once

#include "schedule/step.h"
#include "schedule/topology.h"

namespace dpcomm {

/// What the two share: one chunk, all slices in order, and the place in the heap.
class HeapWalk {
 public:
  static constexpr int kLanes = 1;
  static constexpr int kFirstLane = 0;
  static constexpr int kChannelLanes = 1;
  DPCOMM_HD static constexpr int chunks(const ScheduleParams&) { return 1; }
  DPCOMM_HD static constexpr int min_slots(const ScheduleParams&) { return 1; }

 protected:
  DPCOMM_HD explicit HeapWalk(const ScheduleParams& params)
      : node_(heap_node(params.rank, params.world, params.root)), slices_(params.slices) {}

  DPCOMM_HD bool start(Step& step) {
    if (slice_ == slices_) return false;
    step = Step();
    step.slice = slice_++;
    return true;
  }
  DPCOMM_HD Peers parent() const {
    return node_.is_root() ? Peers::none() : Peers::one(node_.parent);
  }
  DPCOMM_HD Peers children() const { return Peers::of(node_.children[0], node_.children[1]); }

  TreeNode node_;
  int32_t slices_;
  int32_t slice_ = 0;
};

class TreeBroadcast : public HeapWalk {
 public:
  DPCOMM_HD static constexpr int roundings(const ScheduleParams&) { return 0; }
  DPCOMM_HD TreeBroadcast(const ScheduleParams& params, int /*lane*/) : HeapWalk(params) {}

  DPCOMM_HD bool next(Step& step) {
    if (!start(step)) return false;
    step.recv_peers = parent();
    step.send_peers = children();
    step.primitive = static_cast<uint8_t>(kCopy | only_if(!node_.is_root(), kRecv) |
                                          only_if(!node_.is_leaf(), kSend));
    return true;
  }
};

class TreeReduce : public HeapWalk {
 public:
  DPCOMM_HD static constexpr int roundings(const ScheduleParams& params) {
    return heap_depth(params.world);
  }
  DPCOMM_HD TreeReduce(const ScheduleParams& params, int /*lane*/) : HeapWalk(params) {}

  DPCOMM_HD bool next(Step& step) {
    if (!start(step)) return false;
    step.recv_peers = children();
    step.send_peers = parent();
    step.primitive = static_cast<uint8_t>(only_if(!node_.is_leaf(), kRecv | kReduce) |
                                          (node_.is_root() ? kCopy : kSend));
    return true;
  }
};

}  // namespace dpcomm
