// Waiting for a peer: until a flag or a packet is there, the operation is aborted, or the ranks are
// found to disagree. A wait that lasts tells the host about itself (WaitRecord).
#pragma once

#include "cuda/kernel_args.h"
#include "cuda/platform.cuh"

namespace dpcomm::gpu {

/// Writes `what` for the host, `state` last.
DPCOMM_DEVICE void write_record(WaitRecord* record, const WaitRecord& what) {
  store_word_relaxed(&record->rank, what.rank);
  store_word_relaxed(&record->cta, what.cta);
  store_word_relaxed(&record->lane, what.lane);
  store_word_relaxed(&record->step, what.step);
  store_word_relaxed(&record->peer, what.peer);
  store_word_relaxed(&record->seen, what.seen);
  store_word_relaxed(&record->wanted, what.wanted);
  uint32_t* sequence = reinterpret_cast<uint32_t*>(&record->sequence);
  store_word_relaxed(sequence, static_cast<uint32_t>(what.sequence));
  store_word_relaxed(sequence + 1, static_cast<uint32_t>(what.sequence >> 32));
  store_word_relaxed(&record->state, what.state);
}

/// A thread's wait. `what` is what the record will say of it.
class Patience {
 public:
  DPCOMM_DEVICE Patience(const RankState& rank, WaitRecord* record, const WaitRecord& what)
      : rank_(rank), record_(record), what_(what) {}

  /// After a poll in vain that saw `seen`. False: the operation is aborted.
  DPCOMM_DEVICE bool go_on(uint32_t seen) {
    ++polls_;
    if (polls_ % rank_.look_every == 0 && load_word_relaxed(rank_.abort) != 0) return false;
    if (polls_ % rank_.record_after == 0) {
      what_.seen = seen;
      write_record(record_, what_);
      recorded_ = true;
    }
    pause();
    return true;
  }

  /// The wait is over.
  DPCOMM_DEVICE void done() {
    if (recorded_) store_word_relaxed(&record_->state, static_cast<uint32_t>(WaitKind::kNone));
  }

  /// The peer runs another operation, of tag `tag`.
  DPCOMM_DEVICE void disagree(uint32_t tag, uint32_t own_tag) {
    what_.state = static_cast<uint32_t>(WaitKind::kDisagree);
    what_.seen = tag;
    what_.wanted = own_tag;
    write_record(record_, what_);
    store_word_relaxed(rank_.abort, 1);  // operations that are queued must not run
  }

 private:
  const RankState& rank_;
  WaitRecord* record_;
  WaitRecord what_;
  uint32_t polls_ = 0;
  bool recorded_ = false;
};

/// Where a wait's record lies.
DPCOMM_DEVICE WaitRecord* record_at(const RankState& rank, uint32_t cta, uint32_t lane) {
  return rank.waits + cta * kMaxScheduleLanes + lane;
}

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
