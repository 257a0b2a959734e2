// What an executor does when a wait lasts: it finds out why, and says so.
#include <algorithm>
#include <cstring>

#include "base/dtype.h"
#include "cpu/executor.h"

namespace dpcomm {
namespace {

// A rank that waits shows every 50 ms that it runs; one that has not for so long is busy elsewhere
// or stopped. Generous, because the machine may be overloaded.
constexpr int64_t kStillNs = 500'000'000;

std::string joined(const std::vector<std::string>& parts, const char* separator) {
  std::string text;
  for (const std::string& part : parts) text += (text.empty() ? "" : separator) + part;
  return text;
}

}  // namespace

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
  agreed.alive_ns = 0;
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
    const uint64_t sequence = task_->record.sequence;
    if (transport_.announced_at(peer, sequence).sequence == 0) {
      throw usage_error("ranks disagree: ", transport_.describe(rank_), " runs ",
                        describe(task_->record), ", but ", transport_.describe(peer),
                        " sent a message of another operation");
    }
    throw internal_error(describe(task_->record), ": ", transport_.describe(rank_),
                         " got a damaged message from ", transport_.describe(peer),
                         ": the ranks agree on the operation, the message does not");
  }
  if (message.bytes != bytes) {
    throw internal_error(describe(task_->record), ": ", transport_.describe(rank_), " expected ",
                         bytes, " bytes from ", transport_.describe(peer), " and got ",
                         message.bytes);
  }
}

/// Throws if a rank has called another operation than this one in the same place of the order, now
/// or a few operations ago: a broadcast's root, for one, returns before anybody can object.
void Executor::check_disagreement() const {
  const uint64_t now = task_->record.sequence;
  for (uint64_t sequence = now > kKeptOperations ? now - kKeptOperations + 1 : 1; sequence <= now;
       ++sequence) {
    const OpRecord mine = transport_.announced_at(rank_, sequence);
    if (mine.sequence == 0) continue;
    for (int peer = 0; peer < world_; ++peer) {
      const OpRecord other = transport_.announced_at(peer, sequence);
      if (other.sequence == 0 || fingerprint(other) == fingerprint(mine)) continue;
      const bool first = rank_ < peer;  // the same text from both
      throw usage_error("ranks disagree: ", transport_.describe(first ? rank_ : peer), " called ",
                        describe(first ? mine : other), ", but ",
                        transport_.describe(first ? peer : rank_), " called ",
                        describe(first ? other : mine));
    }
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

void Executor::show_life() {
  OpRecord record = task_->record;
  record.alive_ns = now_ns();
  transport_.announce(record);
}

/// What a rank did last: "in all_reduce #7 (...), finished last: barrier #6".
std::string Executor::history(int peer) const {
  const OpRecord last = transport_.announced(peer);
  if (last.sequence == 0) return "no operation yet";
  if (last.finished == last.sequence) return "finished last: " + describe(last);
  const OpRecord finished = transport_.announced_at(peer, last.finished);
  return str("in ", describe(last), ", finished last: ",
             finished.sequence > 0 ? describe(finished) : std::string("nothing"));
}

/// Throws if a rank is gone that has not finished this operation, whether or not it is the one that
/// this rank waits for: nobody can finish an operation with it, and in a chain of ranks that wait
/// for each other the end may be busy elsewhere. What a rank finished before it went is all there.
void Executor::check_peers() const {
  std::vector<std::string> gone;
  for (int peer = 0; peer < world_; ++peer) {
    if (peer == rank_) continue;
    const PeerState state = transport_.peer_state(peer);
    if (state == PeerState::kAlive) continue;
    if (transport_.announced(peer).finished >= task_->record.sequence) continue;
    const bool closed = state == PeerState::kClosed;
    gone.push_back(str(transport_.describe(peer), closed ? " has closed its communicator" : " died",
                       " (", history(peer), ")"));
  }
  if (gone.empty()) return;
  throw peer_error(joined(gone, "; "), "; noticed by ", transport_.describe(rank_), " in ",
                   describe(task_->record));
}

void Executor::find_reason(const std::vector<const Step*>& waiting) {
  if (const auto failure = transport_.failure()) throw Error(failure->kind, failure->message);
  if (interrupted_.load()) {
    throw peer_error(describe(task_->record), " of ", transport_.describe(rank_),
                     " ended: the communicator was closed");
  }
  if (task_->interrupted != nullptr && *task_->interrupted && (*task_->interrupted)()) {
    throw peer_error(transport_.describe(rank_), " was interrupted in ", describe(task_->record));
  }
  show_life();
  check_disagreement();
  check_peers();
  if (Clock::now() > task_->deadline) throw_timeout(waiting);
}

std::string Executor::not_called() const {
  std::vector<std::string> missing;
  for (int peer = 0; peer < world_; ++peer) {
    if (peer == rank_ || transport_.announced(peer).sequence >= task_->record.sequence) continue;
    missing.push_back(str(transport_.describe(peer), " has not called it (", history(peer), ")"));
  }
  return joined(missing, "; ");
}

std::string Executor::not_moving() const {
  std::vector<std::string> still;
  for (int peer = 0; peer < world_; ++peer) {
    const OpRecord other = transport_.announced(peer);
    const int64_t silence_ns = now_ns() - other.alive_ns;
    if (peer == rank_ || other.finished >= task_->record.sequence || silence_ns < kStillNs)
      continue;
    still.push_back(str(transport_.describe(peer), " has given no sign of life for ",
                        silence_ns / 100'000'000 / 10.0, " s (", history(peer), ")"));
  }
  return joined(still, "; ");
}

void Executor::throw_timeout(const std::vector<const Step*>& waiting) {
  std::string reason = not_called();
  if (reason.empty()) {
    reason = not_moving();
    std::vector<std::string> silent;
    for (const int peer : blocking_peers(waiting)) silent.push_back(transport_.describe(peer));
    if (reason.empty()) reason = "nothing came from " + joined(silent, ", ");
    reason = "every rank has called it, but " + reason;
  }
  throw timeout_error(describe(task_->record), " was not complete after ",
                      task_->limit.count() / 1000.0, " s on ", transport_.describe(rank_), ": ",
                      reason);
}

}  // namespace dpcomm
