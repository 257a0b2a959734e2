// Double binary tree all-reduce: half of the data through each of two trees, up and then down.
//
//   4 ranks     tree 0 (chunk 0)        tree 1 (chunk 1)
//                      3                       0
//                     1                         2
//                   0   2                     3   1
//
// Who is a leaf in one tree is inside the other (schedule/topology.h), so the load is even. Each
// rank runs four lanes: up and down of tree 0, up and down of tree 1. Walk for 4 ranks (S send, R
// receive,
// + add, = keep):
//
//   lane          rank 0           rank 1             rank 2           rank 3
//   tree 0 up     c0 S to 1        c0 R+S 0,2 -> 3    c0 S to 1        c0 R+=S of 1, down to 1
//   tree 0 down   c0 R= of 1       c0 R=S 3 -> 0,2    c0 R= of 1       -
//   tree 1 up     c1 R+=S of 2     c1 S to 2          c1 R+S 1,3 -> 0  c1 S to 2
//   tree 1 down   -                c1 R= of 2         c1 R=S 0 -> 1,3  c1 R= of 2
//
// The root's step that receives, adds, keeps and sends belongs to the up lane; it sends on the down
// lane's channels, which the root's down lane never uses.
//
// Steps: one per slice and lane; a slice is done after 2 h hops, h = floor(log2 N) (one more for
// odd N). Bytes sent per rank: at most 2 S, on average 2 (N - 1) / N S. Slots: 1 is safe, since a
// tree has no cycle and up and down have their own channels (lanes 1..4); 2 let a rank receive
// while it sends. Roundings on a lossy wire: h + 1. Invariant: the result of a slice reaches a rank
// only after that rank's own contribution to it has been read. Source: Sanders, Speck, Traeff
// (2009).
#pragma once

#include "schedule/step.h"
#include "schedule/topology.h"

namespace dpcomm {

class DoubleTreeAllReduce {
 public:
  static constexpr int kLanes = 4;  ///< 2 * tree + (0: up, 1: down)
  static constexpr int kFirstLane = 1;
  static constexpr int kChannelLanes = 4;

  DPCOMM_HD static constexpr int chunks(const ScheduleParams&) { return 2; }
  DPCOMM_HD static constexpr int min_slots(const ScheduleParams&) { return 1; }
  DPCOMM_HD static constexpr int roundings(const ScheduleParams& params) {
    return double_tree_depth(params.world) + 1;
  }

  DPCOMM_HD DoubleTreeAllReduce(const ScheduleParams& params, int lane)
      : node_(double_tree_node(params.rank, params.world, lane / 2)),
        slices_(params.slices),
        tree_(lane / 2),
        down_(lane % 2 == 1) {}

  DPCOMM_HD bool next(Step& step) {
    if (slice_ == slices_ || (down_ && node_.is_root())) return false;
    step = Step();
    step.chunk = tree_;
    step.slice = slice_++;
    if (down_) {
      go_down(step);
    } else {
      go_up(step);
    }
    return true;
  }

 private:
  DPCOMM_HD uint8_t up_lane() const { return static_cast<uint8_t>(kFirstLane + 2 * tree_); }
  DPCOMM_HD uint8_t down_lane() const { return static_cast<uint8_t>(up_lane() + 1); }

  DPCOMM_HD Peers children() const { return Peers::of(node_.children[0], node_.children[1]); }

  DPCOMM_HD void go_up(Step& step) const {
    const bool root = node_.is_root();
    const bool leaf = node_.is_leaf();
    step.recv_lane = up_lane();
    step.recv_peers = children();
    step.send_lane = root ? down_lane() : up_lane();
    step.send_peers = root ? children() : Peers::one(node_.parent);
    step.primitive = static_cast<uint8_t>(only_if(!leaf, kRecv | kReduce) | only_if(root, kCopy) |
                                          only_if(!(root && leaf), kSend));
  }

  DPCOMM_HD void go_down(Step& step) const {
    step.recv_lane = step.send_lane = down_lane();
    step.recv_peers = Peers::one(node_.parent);
    step.send_peers = children();
    step.primitive = static_cast<uint8_t>(kRecv | kCopy | only_if(!node_.is_leaf(), kSend));
  }

  TreeNode node_;
  int32_t slices_;
  int32_t tree_;
  bool down_;
  int32_t slice_ = 0;
};

}  // namespace dpcomm
