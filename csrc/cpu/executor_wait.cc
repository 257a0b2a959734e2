// What an executor does when a wait lasts: it finds out why, and says so.
#include <algorithm>

#include "cpu/executor.h"

namespace dpcomm {
void Executor::check_message(int peer, const Message& message, const Slice& slice) const {
  if (message.tag != slice.tag) {
    watch_.check_disagreement(*task_);
    const uint64_t sequence = task_->record.sequence;
    if (transport_.announced_at(peer, sequence).sequence == 0) {
      throw usage_error("ranks disagree: ", transport_.describe(rank_), " runs ",
                        describe(task_->record), ", but ", transport_.describe(peer),
                        " sent a message of another operation");
    }
    if (task_->collective == Collective::kAllToAll) check_block(peer, message, slice);
    throw internal_error(describe(task_->record), ": ", transport_.describe(rank_),
                         " got a damaged message from ", transport_.describe(peer),
                         ": the ranks agree on the operation, the message does not");
  }
  if (message.bytes != slice.wire_bytes) {
    throw internal_error(describe(task_->record), ": ", transport_.describe(rank_), " expected ",
                         slice.wire_bytes, " bytes from ", transport_.describe(peer), " and got ",
                         message.bytes);
  }
}

/// Of an all-to-all, where only the two ends of a channel know how much it carries: throws
/// UsageError if the message is the first one of a block of another size than this rank expects.
void Executor::check_block(int peer, const Message& message, const Slice& slice) const {
  const uint32_t sent = message.tag ^ tag_;
  const uint32_t expected = slice.tag ^ tag_;
  if (message.bytes != std::min<size_t>(sent, cut_.slot_elems) * elem_bytes_) return;
  throw usage_error("ranks disagree: ", transport_.describe(peer), " sends ", sent, " elements to ",
                    transport_.describe(rank_), ", which expects ", expected, ", in ",
                    describe(task_->record));
}

std::vector<int> Executor::blocking_peers(const std::vector<const Step*>& waiting) {
  std::vector<int> peers;
  for (const Step* step : waiting) {
    for (int i = 0; i < step->recv_peers.count(); ++i) {
      const int peer = step->recv_peers[i];
      if (!recv_channel(peer, step->recv_lane).try_peek(messages_[i])) peers.push_back(peer);
    }
    for (int i = 0; i < step->send_peers.count(); ++i) {
      const int peer = step->send_peers[i];
      if (send_channel(peer, step->send_lane).try_acquire() == nullptr) peers.push_back(peer);
    }
  }
  std::sort(peers.begin(), peers.end());
  peers.erase(std::unique(peers.begin(), peers.end()), peers.end());
  return peers;
}

void Executor::find_reason(const std::vector<const Step*>& waiting) {
  watch_.look(*task_, [&] { return blocking_peers(waiting); });
}

}  // namespace dpcomm
