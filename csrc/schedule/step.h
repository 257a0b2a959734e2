// The vocabulary of a schedule: what one rank does, one step at a time.
//
// A schedule is a pure, allocation-free generator of steps for one rank. It knows ranks, lanes and
// the indices of chunks and slices, and knows nothing of bytes, dtypes, pointers, threads, torch or
// CUDA. The CPU executor, the CUDA kernels, the prover, the simulator and the NumPy oracle read the
// same generators.
#pragma once

#include <cstdint>

#include "base/macros.h"

namespace dpcomm {

/// What a step does with its slice; a primitive is a set of these flags.
///
///   SEND                      send the own input
///   COPY | SEND               send the own input and keep it in the output (all-gather, broadcast)
///   COPY                      own input to own output
///   RECV | COPY               received bytes to the output
///   RECV | COPY | SEND        the same, and the bytes forwarded verbatim
///   RECV | SEND               forwarded verbatim, not kept
///   RECV | REDUCE | SEND      received ones and the own input combined, the partial result sent on
///   RECV | REDUCE | COPY      combined; the result is final (AVG divides here) and kept
///   RECV | REDUCE | COPY | SEND   final, kept as it went on the wire, and sent
///
/// A reduction combines the contributions of recv_peers and the own input in ascending order of
/// rank, the own one at its place, in the accumulation type.
enum Primitive : uint8_t {
  kRecv = 1,
  kReduce = 2,
  kCopy = 4,
  kSend = 8,
};

/// `flags` if `on`, else none: how a generator puts a primitive together.
DPCOMM_HD constexpr unsigned only_if(bool on, unsigned flags) { return on ? flags : 0u; }

/// The peers of one side of a step: a set of ranks in three forms, none of which needs memory.
class Peers {
 public:
  static constexpr int kMaxListed = 3;

  DPCOMM_HD static Peers none() { return Peers(); }
  DPCOMM_HD static Peers one(int32_t a) { return of(a, -1); }
  /// Those of the two that are ranks; -1 stands for nobody.
  DPCOMM_HD static Peers of(int32_t a, int32_t b) {
    Peers peers;
    peers.at_[0] = a >= 0 ? a : b;
    peers.at_[1] = b;
    peers.count_ = (a >= 0) + (b >= 0);
    return peers;
  }
  /// Every rank but `self`.
  DPCOMM_HD static Peers others(int32_t self, int32_t world) {
    Peers peers;
    peers.form_ = kOthers;
    peers.count_ = world - 1;
    peers.at_[0] = self;
    return peers;
  }
  /// (self + sign * 2^j) mod world for j = first .. first + count - 1; sign is +1 or -1.
  DPCOMM_HD static Peers powers(int32_t self, int32_t world, int32_t first, int32_t count,
                                int32_t sign) {
    Peers peers;
    peers.form_ = sign > 0 ? kPowersUp : kPowersDown;
    peers.count_ = count;
    peers.at_[0] = self;
    peers.at_[1] = world;
    peers.at_[2] = first;
    return peers;
  }
  /// Adds one more rank to a list of at most kMaxListed.
  DPCOMM_HD Peers& add(int32_t rank) {
    at_[count_++] = rank;
    return *this;
  }

  DPCOMM_HD int32_t count() const { return count_; }
  DPCOMM_HD bool empty() const { return count_ == 0; }

  /// The i-th peer. A list keeps the order in which it was made; `others` is ascending.
  DPCOMM_HD int32_t operator[](int32_t i) const {
    switch (form_) {
      case kListed:
        return at_[i];
      case kOthers:
        return i < at_[0] ? i : i + 1;
      default: {
        const int32_t distance = (int32_t{1} << (at_[2] + i)) % at_[1];
        const int32_t to = at_[0] + (form_ == kPowersUp ? distance : at_[1] - distance);
        return to < at_[1] ? to : to - at_[1];
      }
    }
  }

  /// How many of the peers have a rank below `rank`.
  DPCOMM_HD int32_t below(int32_t rank) const {
    if (form_ == kOthers) return rank <= at_[0] ? rank : rank - 1;
    int32_t found = 0;
    for (int32_t i = 0; i < count_; ++i) found += (*this)[i] < rank;
    return found;
  }

 private:
  enum Form : uint8_t { kListed, kOthers, kPowersUp, kPowersDown };
  int32_t at_[kMaxListed] = {0, 0, 0};
  int32_t count_ = 0;
  Form form_ = kListed;
};

/// One step of one lane of one rank.
struct Step {
  uint8_t primitive = 0;     ///< flags of Primitive
  uint8_t recv_lane = 0;     ///< lane of the channels that it receives on
  uint8_t send_lane = 0;     ///< lane of the channels that it sends on
  bool own_as_sent = false;  ///< the own contribution counts as decode(encode(x)) (law 2)
  int32_t chunk = 0;         ///< index of the chunk within the round
  int32_t slice = 0;         ///< index of the slice within the chunk
  Peers recv_peers;          ///< for a reduction: every one of them contributes
  Peers send_peers;          ///< all get the same bytes

  DPCOMM_HD bool has(uint8_t flags) const { return (primitive & flags) == flags; }
};

/// What a generator is made from. All ranks agree on everything but `rank`.
struct ScheduleParams {
  int32_t rank = 0;
  int32_t world = 1;
  int32_t root = 0;    ///< where there is one (is_rooted)
  int32_t slices = 1;  ///< slices per chunk
};

// A schedule is a class of this form (schedule/algorithms.def lists them all):
//
//   class RingAllReduce {
//    public:
//     static constexpr int kLanes = 1;              // streams of steps, each in order
//     static constexpr int kFirstLane = 0;          // of the channels that it uses
//     static constexpr int kChannelLanes = 1;       // lanes of channels, from kFirstLane on
//     DPCOMM_HD static int chunks(const ScheduleParams&);      // chunks in a round
//     DPCOMM_HD static int min_slots(const ScheduleParams&);   // smallest safe number of slots
//     DPCOMM_HD static int roundings(const ScheduleParams&);   // of a value on its longest path
//     DPCOMM_HD RingAllReduce(const ScheduleParams&, int lane);
//     DPCOMM_HD bool next(Step& step);              // false: this lane's round is over
//   };
//
// One object yields one round of one lane; for the next round a new one is made. Lanes of one rank
// progress independently of each other; the channels of a lane are never used by another lane.

}  // namespace dpcomm
