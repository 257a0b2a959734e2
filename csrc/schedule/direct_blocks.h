// Direct gather, scatter and all-to-all: every block goes in one hop to where it belongs.
//
// 4 ranks; what each rank sends, and what it then receives (= keep). Block c of a gather is rank
// c's, of a scatter for rank c; block s>t of an all-to-all goes from rank s to rank t and is chunk
// s N + t:
//
//   gather, root 1        others: c_r to 1                   rank 1: c1 =, then c2, c3, c0 =
//   scatter, root 1       rank 1: c2, c3, c0 out, c1 =       others: c_r from 1 =
//   all-to-all            rank 0: 0>1, 0>2, 0>3 out, 0>0 =   then 3>0, 2>0, 1>0 =
//                         rank 1: 1>2, 1>3, 1>0 out, 1>1 =   then 0>1, 3>1, 2>1 =
//                         rank 2: 2>3, 2>0, 2>1 out, 2>2 =   then 1>2, 0>2, 3>2 =
//                         rank 3: 3>0, 3>1, 3>2 out, 3>3 =   then 2>3, 1>3, 0>3 =
//
// The i-th message of an all-to-all goes to rank r + i and the i-th one to come is that of rank
// r - i, so no rank is everybody's target at a time.
//
// Steps: gather and scatter N at the root and 1 elsewhere, all-to-all 2 N - 1. Bytes sent per rank:
// (N - 1) / N S (S is the larger tensor) at the root of a scatter and in an all-to-all, S / N at
// the others of a gather. Slots: 1, since a channel carries one message per slice and all sends of
// a slice come before its receives. Roundings: 0, bytes go as they are. Invariant: a rank reads its
// input of a chunk before or in the step that writes its output of it, so the own block may lie in
// place. Source: the linear algorithms of Thakur, Rabenseifner, Gropp (2005); for the order of the
// all-to-all their section 3.3.
//
// No kernel runs these: schedule/host_algorithms.def.
#pragma once

#include "schedule/direct.h"

namespace dpcomm {

class DirectGather : public DirectWalk {
 public:
  DPCOMM_HD static constexpr int chunks(const ScheduleParams& params) { return params.world; }
  DPCOMM_HD static constexpr int roundings(const ScheduleParams&) { return 0; }
  DPCOMM_HD DirectGather(const ScheduleParams& params, int /*lane*/) : DirectWalk(params) {}

  DPCOMM_HD bool next(Step& step) {
    int32_t index;
    if (!take(step, rank_ == root_ ? world_ : 1, index)) return false;
    if (rank_ != root_) {
      step.primitive = kSend;
      step.chunk = rank_;
      step.send_peers = Peers::one(root_);
      return true;
    }
    step.chunk = neighbour(index);
    step.primitive = kCopy;
    if (index > 0) {
      step.primitive = kRecv | kCopy;
      step.recv_peers = Peers::one(step.chunk);
    }
    return true;
  }
};

class DirectScatter : public DirectWalk {
 public:
  DPCOMM_HD static constexpr int chunks(const ScheduleParams& params) { return params.world; }
  DPCOMM_HD static constexpr int roundings(const ScheduleParams&) { return 0; }
  DPCOMM_HD DirectScatter(const ScheduleParams& params, int /*lane*/) : DirectWalk(params) {}

  DPCOMM_HD bool next(Step& step) {
    int32_t index;
    if (!take(step, rank_ == root_ ? world_ : 1, index)) return false;
    if (rank_ != root_) {
      step.primitive = kRecv | kCopy;
      step.chunk = rank_;
      step.recv_peers = Peers::one(root_);
      return true;
    }
    step.primitive = kCopy;
    step.chunk = rank_;
    if (index < world_ - 1) {
      step.primitive = kSend;
      step.chunk = neighbour(index + 1);
      step.send_peers = Peers::one(step.chunk);
    }
    return true;
  }
};

class DirectAllToAll : public DirectWalk {
 public:
  DPCOMM_HD static constexpr int chunks(const ScheduleParams& params) {
    return params.world * params.world;
  }
  DPCOMM_HD static constexpr int roundings(const ScheduleParams&) { return 0; }
  DPCOMM_HD DirectAllToAll(const ScheduleParams& params, int /*lane*/) : DirectWalk(params) {}

  DPCOMM_HD bool next(Step& step) {
    int32_t index;
    if (!take(step, 2 * world_ - 1, index)) return false;
    if (index < world_ - 1) {
      const int32_t to = neighbour(index + 1);
      step.primitive = kSend;
      step.chunk = rank_ * world_ + to;
      step.send_peers = Peers::one(to);
    } else if (index == world_ - 1) {
      step.primitive = kCopy;
      step.chunk = rank_ * world_ + rank_;
    } else {
      const int32_t from = neighbour(2 * world_ - 1 - index);
      step.primitive = kRecv | kCopy;
      step.chunk = from * world_ + rank_;
      step.recv_peers = Peers::one(from);
    }
    return true;
  }
};

}  // namespace dpcomm
