// How ranks on one host come to share a segment (shm.cc says what lies in it and why).
//
// Through the store, keys below "dpcomm/<name of the group>/"; round k is 0 for a segment without a
// name, 1 for a file with one:
//
//   rank r  -> "here/r"       at once, which process it is: whoever waits in vain can say for whom,
//                             and sees when it is gone
//   rank 0  -> "offer/k"      where the segment is, size of slots, nonce; or the error for all
//   rank r  -> "answer/k/r"   "ok" once it has attached, "no ..." if it cannot, or an error
//   rank 0  -> "verdict/k"    "go", "again", or the error for all
//   rank r  -> "read/r"       after an error: rank 0, which may keep the store, waits a while for
//                             it
//   rank r  -> "decision"     the error for all where rank 0 does not come or go on; of the lowest
//                             rank that is there
//
// Then every rank says in the segment that it is ready and waits until all have said so. After that
// nobody needs the store. What the values look like is in handshake.h and process.h.
#pragma once

#include <sys/types.h>

#include <chrono>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/clock.h"
#include "transport/handshake.h"
#include "transport/process.h"
#include "transport/segment.h"
#include "transport/shared_arena.h"

namespace dpcomm {

class ShmTransport final : public ArenaTransport {
 public:
  /// Attaches. The nonce is at the end of the segment, so that a stranger's file is refused.
  ShmTransport(int rank, ArenaLayout layout, Segment segment, uint64_t nonce);
  ~ShmTransport() override;

  PeerState peer_state(int rank) const override;

  static size_t segment_bytes(const ArenaLayout& layout) { return layout.bytes() + kLine; }
  /// Where others can open the segment.
  int fd() const { return segment_.fd(); }
  const std::string& path() const { return segment_.path(); }
  void unlink() { segment_.unlink(); }
  bool has_come(int rank) const { return line(rank).state.load() != 0; }
  using ArenaTransport::attendance;
  using ArenaTransport::probe_reach;
  using ArenaTransport::raise;
  using ArenaTransport::wait_for_all;

 private:
  void lock_own_byte();

  Segment segment_;
  std::byte* base_ = nullptr;
  size_t bytes_ = 0;
  pid_t owner_ = 0;
};

/// The key under which a rank of a group says which process it is.
std::string here_key(const std::string& group, int rank);

/// The start of one rank.
class Rendezvous {
 public:
  explicit Rendezvous(const TransportConfig& config);

  /// Throws TimeoutError naming the ranks that did not come, PeerError naming a rank that died, and
  /// whatever rank 0 met with, with the same text on every rank.
  std::unique_ptr<Transport> run();

 private:
  using Attached = std::unique_ptr<ShmTransport>;

  Attached lead();
  Attached lead_round(int round);
  Attached create(int round, uint64_t* nonce) const;
  std::string collect_answers(const ShmTransport& transport, int round);
  void report(const std::string& key, const std::exception& error) noexcept;

  Attached follow();
  Attached follow_round(int round);
  Attached attach(const Offer& offer) const;
  [[noreturn]] void give_up(ShmTransport* transport);
  Error decided(const Error& own);
  std::optional<Error> decision(std::chrono::milliseconds patience);
  void throw_if_error(const std::string& text);

  ArenaLayout layout(size_t slot_bytes) const;
  std::vector<Attendant> attendance(const ShmTransport* transport);
  void watch(const ShmTransport& transport, int first, int last);
  const Presence* presence(int rank);
  void watch_process(int rank);

  void set(const std::string& key, const std::string& value);
  /// Waits until the deadline, and calls `look` every now and then; false if the key did not come.
  bool get(const std::string& key, std::string& value, const std::function<void()>& look = {});
  /// Calls the store; where it fails because rank 0 is gone, throws the PeerError that says so.
  template <class Call>
  auto ask(Call&& call);

  const TransportConfig& config_;
  Clock::time_point deadline_;
  std::vector<std::optional<Presence>> present_;  // as far as known
};

}  // namespace dpcomm
