#include "cpu/messenger.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace dpcomm {

Messenger::Messenger(Transport& transport)
    : transport_(transport),
      diagnosis_(transport, Place::kHost),
      rank_(transport.rank()),
      slots_(transport.geometry(transport.message_lane()).slots),
      payload_bytes_(transport.geometry(transport.message_lane()).slot_bytes - sizeof(Packet)),
      peers_(transport.world()) {
  for (int rank = 0; rank < transport.world(); ++rank) {
    if (rank == rank_) continue;
    peers_[rank].out = &transport.send_channel(rank, transport.message_lane());
    peers_[rank].in = &transport.recv_channel(rank, transport.message_lane());
  }
}

void Messenger::post(Ref transfer) {
  open_.push_back(transfer);
  transfer->place_ = std::prev(open_.end());
  if (transfer->sends) {
    const int peer = transfer->peer;
    peers_[peer].announcements.push_back(std::move(transfer));
    transmit(peer, false);
    return;
  }
  const auto list = announced_.find(transfer->tag);
  if (list != announced_.end()) {
    for (auto at = list->second.begin(); at != list->second.end(); ++at) {
      if (transfer->peer != Transfer::kAnyPeer && transfer->peer != at->source) continue;
      const Announced message = std::move(*at);
      list->second.erase(at);
      if (list->second.empty()) announced_.erase(list);
      peers_[message.source].kept_bytes -= message.payload.size();
      meet(transfer, message.source, message.id, message.bytes, message.kept,
           message.payload.data());
      transmit(message.source, false);
      return;
    }
  }
  receives_[transfer->tag].push_back(std::move(transfer));
}

bool Messenger::progress() {
  bool moved = false;
  for (int peer = 0; peer < static_cast<int>(peers_.size()); ++peer) {
    if (peer == rank_) continue;
    moved |= receive(peer);
    moved |= transmit(peer, true);
  }
  return moved;
}

std::list<std::shared_ptr<Transfer>> Messenger::abandon() {
  for (Peer& peer : peers_) {
    peer.answers.clear();
    peer.announcements.clear();
    peer.unanswered.clear();
    peer.clear.clear();
    peer.coming.clear();
  }
  receives_.clear();
  announced_.clear();
  streaming_ = 0;
  return std::exchange(open_, {});
}

void Messenger::finish(const Ref& transfer) {
  finished_.push_back(transfer);
  open_.erase(transfer->place_);
}

// --- what comes ---

bool Messenger::receive(int peer) {
  Message message;
  int packets = 0;
  for (; packets < slots_ && peers_[peer].in->try_peek(message); ++packets) {
    take(peer, message);
    peers_[peer].in->release();
  }
  return packets > 0;
}

void Messenger::take(int peer, const Message& message) {
  if (message.tag != ++peers_[peer].packets_come) throw_damaged(peer, "it is out of order");
  if (message.bytes < sizeof(Packet)) throw_damaged(peer, "it is too short");
  Packet packet;
  std::memcpy(&packet, message.data, sizeof(packet));
  const std::byte* payload = message.data + sizeof(packet);
  const size_t bytes = message.bytes - sizeof(packet);
  switch (packet.kind) {
    case Kind::kAnnounce:
      return take_announcement(peer, packet, payload, bytes);
    case Kind::kAnswer:
      return take_answers(peer, payload, bytes);
    case Kind::kData:
      return take_data(peer, packet, payload, bytes);
  }
  throw_damaged(peer, "it is of no known kind");
}

void Messenger::take_announcement(int peer, const Packet& packet, const std::byte* payload,
                                  size_t bytes) {
  Peer& from = peers_[peer];
  if (bytes != (packet.comes_along ? packet.bytes : 0)) throw_damaged(peer, "its size is wrong");
  ++from.announced;
  from.last_tag = packet.tag;
  from.last_bytes = packet.bytes;
  const auto list = receives_.find(packet.tag);
  if (list != receives_.end()) {
    for (auto at = list->second.begin(); at != list->second.end(); ++at) {
      if ((*at)->peer != Transfer::kAnyPeer && (*at)->peer != peer) continue;
      const Ref receive = std::move(*at);
      list->second.erase(at);
      if (list->second.empty()) receives_.erase(list);
      meet(receive, peer, packet.id, packet.bytes, packet.comes_along != 0, payload);
      return;
    }
  }
  Announced message{peer, packet.id, packet.bytes, false, {}};
  message.kept = packet.comes_along && from.kept_bytes + bytes <= kKeptBytes;
  if (message.kept) {
    message.payload.assign(payload, payload + bytes);
    from.kept_bytes += bytes;
  }
  announced_[packet.tag].push_back(std::move(message));
}

/// `here`: all of the message is at `payload`.
void Messenger::meet(const Ref& receive, int source, uint32_t id, size_t bytes, bool here,
                     const std::byte* payload) {
  if (bytes != receive->bytes) {
    throw usage_error("sizes differ: ", transport_.describe(source), " sends ", bytes,
                      " bytes with tag ", receive->tag, ", and ", transport_.describe(rank_),
                      " receives ", receive->bytes, " bytes",
                      receive->peer == Transfer::kAnyPeer ? " from any rank" : "");
  }
  Peer& from = peers_[source];
  receive->source = source;
  receive->id_ = id;
  if (here) {
    if (bytes > 0) std::memcpy(receive->data, payload, bytes);
    receive->moved = bytes;
    from.answers.push_back({{id, 0}, receive});
  } else {
    from.coming.emplace(id, receive);
    ++streaming_;
    from.answers.push_back({{id, 1}, nullptr});
  }
}

void Messenger::take_answers(int peer, const std::byte* payload, size_t bytes) {
  Peer& from = peers_[peer];
  if (bytes == 0 || bytes % sizeof(Answer) != 0) throw_damaged(peer, "its size is wrong");
  for (size_t offset = 0; offset < bytes; offset += sizeof(Answer)) {
    Answer answer;
    std::memcpy(&answer, payload + offset, sizeof(answer));
    const auto found = from.unanswered.find(answer.id);
    if (found == from.unanswered.end()) throw_damaged(peer, "it answers no message");
    const Ref send = std::move(found->second);
    from.unanswered.erase(found);
    if (answer.clear != 0) {
      from.clear.push_back(send);
      ++streaming_;
    } else {
      send->moved = send->bytes;
      finish(send);
    }
  }
}

void Messenger::take_data(int peer, const Packet& packet, const std::byte* payload, size_t bytes) {
  Peer& from = peers_[peer];
  const auto found = from.coming.find(packet.id);
  if (found == from.coming.end()) throw_damaged(peer, "nobody has asked for its data");
  const Ref receive = found->second;
  if (packet.offset != receive->moved || bytes == 0 || bytes > receive->bytes - receive->moved) {
    throw_damaged(peer, "its data does not fit");
  }
  std::memcpy(receive->data + receive->moved, payload, bytes);
  receive->moved += bytes;
  if (receive->moved < receive->bytes) return;
  from.coming.erase(found);
  --streaming_;
  finish(receive);
}

// --- what leaves ---

/// Answers first: others wait for them. Then announcements and data take turns.
bool Messenger::transmit(int rank, bool also_data) {
  Peer& peer = peers_[rank];
  int packets = 0;
  for (; packets < slots_; ++packets) {
    const bool data = also_data && !peer.clear.empty();
    if (peer.answers.empty() && peer.announcements.empty() && !data) break;
    std::byte* slot = peer.out->try_acquire();
    if (slot == nullptr) break;
    if (!peer.answers.empty()) {
      send_answers(peer, slot);
    } else if (!peer.announcements.empty() && !(data && peer.data_next)) {
      peer.data_next = true;
      send_announcement(peer, slot);
    } else {
      peer.data_next = false;
      send_data(peer, slot);
    }
  }
  return packets > 0;
}

void Messenger::send_answers(Peer& peer, std::byte* slot) {
  const size_t count = std::min(peer.answers.size(), payload_bytes_ / sizeof(Answer));
  for (size_t i = 0; i < count; ++i) {
    std::memcpy(slot + sizeof(Packet) + i * sizeof(Answer), &peer.answers[i].answer,
                sizeof(Answer));
  }
  publish(peer, slot, Packet{Kind::kAnswer, 0, 0, 0, 0, 0, {}}, count * sizeof(Answer));
  for (size_t i = 0; i < count; ++i) {
    if (peer.answers.front().taken_by != nullptr) finish(peer.answers.front().taken_by);
    peer.answers.pop_front();
  }
}

void Messenger::send_announcement(Peer& peer, std::byte* slot) {
  const Ref send = std::move(peer.announcements.front());
  peer.announcements.pop_front();
  send->id_ = peer.next_id++;
  const bool comes_along = send->bytes <= std::min(kShortBytes, payload_bytes_);
  const size_t bytes = comes_along ? send->bytes : 0;
  if (bytes > 0) std::memcpy(slot + sizeof(Packet), send->data, bytes);
  peer.unanswered.emplace(send->id_, send);
  publish(peer, slot,
          Packet{Kind::kAnnounce, send->id_, send->tag, comes_along, send->bytes, 0, {}}, bytes);
}

void Messenger::send_data(Peer& peer, std::byte* slot) {
  const Ref send = peer.clear.front();
  const size_t bytes = std::min(payload_bytes_, send->bytes - send->moved);
  std::memcpy(slot + sizeof(Packet), send->data + send->moved, bytes);
  publish(peer, slot, Packet{Kind::kData, send->id_, send->tag, 0, send->bytes, send->moved, {}},
          bytes);
  send->moved += bytes;
  if (send->moved < send->bytes) return;
  peer.clear.pop_front();
  --streaming_;
  finish(send);
}

void Messenger::publish(Peer& peer, std::byte* slot, const Packet& packet, size_t payload_bytes) {
  std::memcpy(slot, &packet, sizeof(packet));
  const size_t bytes = sizeof(packet) + payload_bytes;
  peer.out->publish(static_cast<uint32_t>(bytes), ++peer.packets_sent);
  wire_bytes_ += bytes;
}

}  // namespace dpcomm
