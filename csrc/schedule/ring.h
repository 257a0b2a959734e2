// Ring all-reduce, reduce-scatter and all-gather: chunks travel from rank to rank + 1.
//
//   rank 0 -> rank 1 -> rank 2 -> rank 3 -> rank 0
//
// All-reduce for 4 ranks; the chunk that each rank works on, and what it does (S send, R receive,
// + add, = keep). Chunk c is complete at rank c.
//
//   time       0      1       2       3        4       5       6
//   rank 0     c3 S   c2 R+S  c1 R+S  c0 R+=S  c3 R=S  c2 R=S  c1 R=
//   rank 1     c0 S   c3 R+S  c2 R+S  c1 R+=S  c0 R=S  c3 R=S  c2 R=
//   rank 2     c1 S   c0 R+S  c3 R+S  c2 R+=S  c1 R=S  c0 R=S  c3 R=
//   rank 3     c2 S   c1 R+S  c0 R+S  c3 R+=S  c2 R=S  c1 R=S  c0 R=
//
// Reduce-scatter is times 0..3 without the last send; all-gather is times 3..6 with the own input
// in place of the sum.
//
// Steps: 2N - 1 (reduce-scatter, all-gather: N). Bytes sent per rank: 2 (N - 1) / N S, the least
// that an all-reduce can do (reduce-scatter, all-gather: half).
// Slots: slices + 1. All slices of a time come before the next time, so after time 0 every channel
// holds `slices` messages, and a step that receives and sends needs one more slot to begin.
// Roundings on a lossy wire: N for all-reduce, N - 1 for reduce-scatter.
// Invariant: at time t a partial sum has t + 1 contributions, those of the ranks behind it. A rank
// reads its input of a chunk (t < N) before it writes its output of that chunk (t >= N - 1).
// Source: Patarasuk, Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations"
// (2009).
#pragma once

#include "schedule/step.h"

namespace dpcomm {

/// The walk that the three share: for each time from 0 all slices, and a chunk that falls by one
/// with each time.
class RingWalk {
 public:
  static constexpr int kLanes = 1;
  static constexpr int kFirstLane = 0;
  static constexpr int kChannelLanes = 1;
  DPCOMM_HD static constexpr int chunks(const ScheduleParams& params) { return params.world; }

 protected:
  DPCOMM_HD RingWalk(const ScheduleParams& params, int32_t first_chunk, int32_t times)
      : rank_(params.rank),
        world_(params.world),
        slices_(params.slices),
        times_(times),
        chunk_((first_chunk + params.world) % params.world) {}

  DPCOMM_HD bool over() const { return time_ == times_; }

  /// Fills `step` with the next slice and moves on.
  DPCOMM_HD void take(Step& step, unsigned primitive) {
    step = Step();
    step.primitive = static_cast<uint8_t>(primitive);
    step.chunk = chunk_;
    step.slice = slice_;
    if (primitive & kRecv) step.recv_peers = Peers::one((rank_ + world_ - 1) % world_);
    if (primitive & kSend) step.send_peers = Peers::one((rank_ + 1) % world_);
    if (++slice_ < slices_) return;
    slice_ = 0;
    ++time_;
    chunk_ = chunk_ == 0 ? world_ - 1 : chunk_ - 1;
  }

  int32_t rank_, world_, slices_, times_;
  int32_t chunk_;
  int32_t time_ = 0;
  int32_t slice_ = 0;
};

class RingAllReduce : public RingWalk {
 public:
  DPCOMM_HD static constexpr int min_slots(const ScheduleParams& params) {
    return params.world == 1 ? 1 : params.slices + 1;
  }
  DPCOMM_HD static constexpr int roundings(const ScheduleParams& params) { return params.world; }

  DPCOMM_HD RingAllReduce(const ScheduleParams& params, int /*lane*/)
      : RingWalk(params, params.rank - 1, 2 * params.world - 1) {}

  DPCOMM_HD bool next(Step& step) {
    if (over()) return false;
    const int32_t complete = world_ - 1;  // the time at which the sum is complete
    take(step, only_if(time_ > 0, kRecv) | only_if(0 < time_ && time_ <= complete, kReduce) |
                   only_if(time_ >= complete, kCopy) | only_if(time_ < times_ - 1, kSend));
    return true;
  }
};

class RingReduceScatter : public RingWalk {
 public:
  DPCOMM_HD static constexpr int min_slots(const ScheduleParams& params) {
    return params.world == 1 ? 1 : params.slices + (params.world > 2);
  }
  DPCOMM_HD static constexpr int roundings(const ScheduleParams& params) {
    return params.world - 1;
  }

  DPCOMM_HD RingReduceScatter(const ScheduleParams& params, int /*lane*/)
      : RingWalk(params, params.rank - 1, params.world) {}

  DPCOMM_HD bool next(Step& step) {
    if (over()) return false;
    const bool last = time_ == times_ - 1;
    take(step, only_if(time_ > 0, kRecv) | only_if(time_ > 0, kReduce) | only_if(last, kCopy) |
                   only_if(!last, kSend));
    return true;
  }
};

class RingAllGather : public RingWalk {
 public:
  DPCOMM_HD static constexpr int min_slots(const ScheduleParams& params) {
    return params.world == 1 ? 1 : params.slices + (params.world > 2);
  }
  DPCOMM_HD static constexpr int roundings(const ScheduleParams&) { return 0; }

  DPCOMM_HD RingAllGather(const ScheduleParams& params, int /*lane*/)
      : RingWalk(params, params.rank, params.world) {}

  DPCOMM_HD bool next(Step& step) {
    if (over()) return false;
    take(step, only_if(time_ > 0, kRecv) | kCopy | only_if(time_ < times_ - 1, kSend));
    return true;
  }
};

}  // namespace dpcomm
