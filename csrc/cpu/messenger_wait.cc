// What a messenger does when a wait lasts: it finds out why, and says so.
#include <algorithm>

#include "cpu/messenger.h"

namespace dpcomm {

std::string Messenger::describe(const Transfer& transfer) const {
  const bool any = transfer.peer == Transfer::kAnyPeer;
  return str(transfer.sends ? "send of " : "receive of ", transfer.bytes, " bytes ",
             transfer.sends ? "to " : "from ",
             any ? std::string("any rank") : transport_.describe(transfer.peer), ", tag ",
             transfer.tag);
}

void Messenger::check() {
  if (open_.empty()) return;
  check_gone();
  const auto now = Clock::now();
  for (const Ref& transfer : open_) {
    if (now > transfer->deadline) throw_timeout(*transfer);
  }
}

/// A rank that died ends all, as it does for collectives; one that has closed is only missed by who
/// needs it. What they had published is taken first: so it has to be seen twice, and between the
/// two all of the channel was looked at.
void Messenger::check_gone() {
  constexpr int kSure = 2;
  int there = 0;
  for (int rank = 0; rank < static_cast<int>(peers_.size()); ++rank) {
    if (rank == rank_) continue;
    Peer& peer = peers_[rank];
    const PeerState state = transport_.peer_state(rank);
    if (state == PeerState::kAlive || ++peer.gone < kSure) {
      ++there;
      continue;
    }
    if (state == PeerState::kDead) throw_gone(rank, "died", *open_.front());
    // Nobody is left to read the answers to what has come.
    for (const PendingAnswer& pending : peer.answers) {
      if (pending.taken_by != nullptr) finish(pending.taken_by);
    }
    peer.answers.clear();
  }
  for (const Ref& transfer : open_) {
    const int rank = transfer->source >= 0 ? transfer->source : transfer->peer;
    if (rank != Transfer::kAnyPeer && peers_[rank].gone >= kSure) {
      throw_gone(rank, "has closed its communicator", *transfer);
    }
    if (rank == Transfer::kAnyPeer && there == 0) {
      throw peer_error("all other ranks have closed their communicators; noticed by ",
                       transport_.describe(rank_), " in ", describe(*transfer));
    }
  }
}

std::optional<Failure> Messenger::death() const {
  if (open_.empty()) return std::nullopt;
  for (int rank = 0; rank < static_cast<int>(peers_.size()); ++rank) {
    if (rank == rank_ || transport_.peer_state(rank) != PeerState::kDead) continue;
    try {
      throw_gone(rank, "died", *open_.front());
    } catch (const Error& error) {
      return Failure{error.kind(), error.what()};
    }
  }
  return std::nullopt;
}

void Messenger::throw_gone(int rank, const char* how, const Transfer& transfer) const {
  throw peer_error(transport_.describe(rank), " ", how, " (", diagnosis_.history(rank),
                   "); noticed by ", transport_.describe(rank_), " in ", describe(transfer));
}

void Messenger::throw_timeout(const Transfer& transfer) const {
  throw timeout_error(describe(transfer), ", was not complete after ",
                      transfer.limit.count() / 1000.0, " s on ", transport_.describe(rank_), ": ",
                      reason(transfer));
}

void Messenger::throw_damaged(int peer, const char* what) const {
  throw internal_error(transport_.describe(rank_), " got a damaged packet from ",
                       transport_.describe(peer), ": ", what);
}

std::string Messenger::reason(const Transfer& transfer) const {
  const auto moved = [&](const char* how) {
    return str(transfer.moved, " of ", transfer.bytes, " bytes ", how);
  };
  if (!transfer.sends && transfer.source >= 0) {
    return str("of a message of ", transport_.describe(transfer.source), " ", moved("have come"));
  }
  if (!transfer.sends && transfer.peer == Transfer::kAnyPeer) {
    return str("no rank has sent such a message", unexpected());
  }
  const Peer& peer = peers_[transfer.peer];
  const std::string name = transport_.describe(transfer.peer);
  if (!transfer.sends) return str(name, " has not sent it", last_news(transfer.peer), unexpected());
  const auto waits_in = [&](const std::deque<Ref>& list) {
    return std::any_of(list.begin(), list.end(),
                       [&](const Ref& r) { return r.get() == &transfer; });
  };
  if (waits_in(peer.announcements)) return str(name, " takes nothing from its channel");
  if (waits_in(peer.clear)) return str(name, " receives it, but ", moved("could be sent"));
  return str(name, " has not received it", last_news(transfer.peer));
}

/// What a rank was last heard of.
std::string Messenger::last_news(int rank) const {
  const Peer& peer = peers_[rank];
  std::string text = " (";
  if (peer.announced == 0) {
    text += str("it has sent nothing to this rank");
  } else {
    text += str("it last sent ", peer.last_bytes, " bytes with tag ", peer.last_tag);
  }
  return str(text, "; ", diagnosis_.history(rank), ")");
}

/// Messages that nobody receives.
std::string Messenger::unexpected() const {
  constexpr int kNamed = 4;
  int count = 0;
  std::vector<std::string> named;
  for (const auto& [tag, messages] : announced_) {
    for (const Announced& message : messages) {
      if (++count > kNamed) continue;
      named.push_back(str(message.bytes, " bytes with tag ", tag, " from ",
                          transport_.describe(message.source)));
    }
  }
  if (count == 0) return "";
  if (count > kNamed) named.push_back(str(count - kNamed, " more"));
  return "; nobody receives " + joined(named, ", ");
}

}  // namespace dpcomm
