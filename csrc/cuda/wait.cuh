// Waiting for a peer: until a flag or a packet is there, the operation is aborted, or the ranks are
// found to disagree. A wait that lasts tells the host about itself (WaitRecord).
#pragma once

#include "cuda/kernel_args.h"
#include "cuda/platform.cuh"

namespace dpcomm::gpu {

/// A thread's wait.
class Patience {
 public:
  /// `step` and `wanted` are for the record, and so are cta and lane, which also say where it lies.
  DPCOMM_DEVICE Patience(const RankState& rank, WaitKind kind, uint32_t cta, uint32_t lane,
                         uint32_t step, uint32_t wanted, uint64_t sequence)
      : rank_(rank),
        kind_(kind),
        cta_(cta),
        lane_(lane),
        step_(step),
        wanted_(wanted),
        sequence_(sequence) {}

  /// After a poll in vain, of something of `peer` that was seen as `seen`. False: the operation is
  /// aborted.
  DPCOMM_DEVICE bool go_on(int32_t peer, uint32_t seen) {
    ++polls_;
    if (polls_ % rank_.look_every == 0 && load_word_relaxed(rank_.abort) != 0) return false;
    if (polls_ % rank_.record_after == 0) record(kind_, peer, seen, wanted_);
    pause();
    return true;
  }

  /// The wait is over.
  DPCOMM_DEVICE void done() {
    if (polls_ < rank_.record_after) return;
    store_word_relaxed(&place()->state, static_cast<uint32_t>(WaitKind::kNone));
  }

  /// `peer` runs another operation, of tag `tag`.
  DPCOMM_DEVICE void disagree(int32_t peer, uint32_t tag, uint32_t own_tag) {
    record(WaitKind::kDisagree, peer, tag, own_tag);
    store_word_relaxed(rank_.abort, 1);  // operations that are queued must not run
  }

 private:
  DPCOMM_DEVICE WaitRecord* place() const {
    return rank_.waits + anew(cta_) * kMaxScheduleLanes + lane_;
  }

  DPCOMM_DEVICE void record(WaitKind kind, int32_t peer, uint32_t seen, uint32_t wanted) {
    WaitRecord* to = place();
    store_word_relaxed(&to->rank, static_cast<uint32_t>(rank_.rank));
    store_word_relaxed(&to->cta, cta_);
    store_word_relaxed(&to->lane, lane_);
    store_word_relaxed(&to->step, step_);
    store_word_relaxed(&to->peer, static_cast<uint32_t>(peer));
    store_word_relaxed(&to->seen, seen);
    store_word_relaxed(&to->wanted, wanted);
    uint32_t* sequence = reinterpret_cast<uint32_t*>(&to->sequence);
    store_word_relaxed(sequence, static_cast<uint32_t>(sequence_));
    store_word_relaxed(sequence + 1, static_cast<uint32_t>(sequence_ >> 32));
    store_word_relaxed(&to->state, static_cast<uint32_t>(kind));  // last
  }

  const RankState& rank_;
  WaitKind kind_;
  uint32_t cta_, lane_, step_, wanted_;
  uint64_t sequence_;
  uint32_t polls_ = 0;
};

/// Copies a plain struct from device memory, in words of 8 bytes.
template <class T>
DPCOMM_DEVICE void load_struct(T& to, const T* from) {
  static_assert(sizeof(T) % 8 == 0);
  uint64_t* words = reinterpret_cast<uint64_t*>(&to);
  const char* place = reinterpret_cast<const char*>(from);
  DPCOMM_UNROLL
  for (uint32_t i = 0; i < sizeof(T) / 8; ++i) words[i] = load_one<uint64_t>(place + 8 * i);
}

}  // namespace dpcomm::gpu
