// What an executor does when a wait lasts: it finds out why, and says so.
#include <algorithm>
#include <cstring>

#include "base/dtype.h"
#include "cpu/executor.h"

namespace dpcomm {

std::string describe(const OpRecord& record) {
  const auto collective = static_cast<Collective>(record.collective);
  std::string text = str(name(collective), " #", record.sequence);
  if (collective == Collective::kBarrier) return text;
  text += str(" (", record.count, " x ", name(static_cast<Dtype>(record.dtype)));
  if (reduces(collective)) text += str(", ", name(static_cast<ReduceOp>(record.op)));
  if (record.op == static_cast<uint8_t>(ReduceOp::kPremulSum)) text += str(" ", record.factor);
  if (collective == Collective::kBroadcast || collective == Collective::kReduce) {
    text += str(", root ", record.root);
  }
  text += str(", ", kAlgorithms[record.algorithm].name);
  const auto wire = static_cast<WireFormat>(record.wire);
  if (wire != WireFormat::kNative) text += str(", wire ", name(wire));
  return text + ")";
}

uint32_t fingerprint(const OpRecord& record) {
  OpRecord agreed = record;
  agreed.finished = 0;
  uint64_t words[sizeof(OpRecord) / sizeof(uint64_t)];
  static_assert(sizeof(words) == sizeof(agreed));
  std::memcpy(words, &agreed, sizeof(words));
  uint64_t hash = 0;
  for (const uint64_t word : words) {  // splitmix64's finaliser over a running sum
    hash += word + 0x9e3779b97f4a7c15u;
    hash = (hash ^ (hash >> 30)) * 0xbf58476d1ce4e5b9u;
    hash = (hash ^ (hash >> 27)) * 0x94d049bb133111ebu;
    hash ^= hash >> 31;
  }
  const auto tag = static_cast<uint32_t>(hash ^ (hash >> 32));
  return tag == 0 ? 1 : tag;
}

void Executor::check_message(int peer, const Message& message, size_t bytes) const {
  if (message.tag != tag_) {
    check_disagreement();
    throw usage_error("ranks disagree: ", transport_.describe(rank_), " runs ",
                      describe(task_->record), ", but ", transport_.describe(peer),
                      " sent a message of another operation");
  }
  if (message.bytes != bytes) {
    throw internal_error(describe(task_->record), ": ", transport_.describe(rank_), " expected ",
                         bytes, " bytes from ", transport_.describe(peer), " and got ",
                         message.bytes);
  }
}

void Executor::check_disagreement() const {
  for (int peer = 0; peer < world_; ++peer) {
    const OpRecord other = transport_.announced(peer);
    if (other.sequence != task_->record.sequence || fingerprint(other) == tag_) continue;
    const OpRecord& mine = task_->record;
    const bool first = rank_ < peer;  // the same text from both
    throw usage_error("ranks disagree: ", transport_.describe(first ? rank_ : peer), " runs ",
                      describe(first ? mine : other), ", but ",
                      transport_.describe(first ? peer : rank_), " runs ",
                      describe(first ? other : mine));
  }
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
  if (const auto failure = transport_.failure()) throw Error(failure->kind, failure->message);
  if (interrupted_.load()) {
    throw peer_error(describe(task_->record), " of ", transport_.describe(rank_),
                     " ended: the communicator was closed");
  }
  check_disagreement();
  for (const int peer : blocking_peers(waiting)) {
    const PeerState state = transport_.peer_state(peer);
    if (state == PeerState::kAlive) continue;
    // It may have sent what this rank waits for before it went.
    const std::vector<int> still = blocking_peers(waiting);
    if (std::find(still.begin(), still.end(), peer) == still.end()) continue;
    const OpRecord last = transport_.announced(peer);
    throw peer_error(transport_.describe(peer),
                     state == PeerState::kDead ? " died" : " has closed its communicator",
                     ": it had finished operation #", last.finished, "; ",
                     transport_.describe(rank_), " waits for it in ", describe(task_->record));
  }
  if (Clock::now() > task_->deadline) throw_timeout(waiting);
}

void Executor::throw_timeout(const std::vector<const Step*>& waiting) {
  std::string missing, behind;
  for (int peer = 0; peer < world_; ++peer) {
    const OpRecord other = transport_.announced(peer);
    if (peer == rank_ || other.sequence >= task_->record.sequence) continue;
    missing +=
        str(missing.empty() ? "" : "; ", transport_.describe(peer), " has not called it (it ",
            other.sequence > other.finished ? str("is in ", describe(other))
            : other.finished > 0            ? str("finished ", describe(other))
                                            : std::string("has run no operation"),
            ")");
  }
  for (const int peer : blocking_peers(waiting)) {
    behind += str(behind.empty() ? "" : ", ", transport_.describe(peer));
  }
  throw timeout_error(describe(task_->record), " ran out of time on ", transport_.describe(rank_),
                      ": ", missing.empty() ? "every rank has called it, but " : missing,
                      missing.empty() ? behind : "", missing.empty() ? " did not answer" : "");
}

}  // namespace dpcomm
