// How ranks on one host come to share a segment (shm.cc says what lies in it and why).
//
// Through the store, keys below "dpcomm/<name of the group>/"; round k is 0 for a segment without a
// name, 1 for a file with one:
//
//   rank r  -> "here/r"       at once, so that whoever waits in vain can say for whom
//   rank 0  -> "offer/k"      where the segment is, size of slots, nonce; or the error for all
//   rank r  -> "answer/k/r"   "ok" once it has attached, or why it could not
//   rank 0  -> "verdict/k"    "go", "again", or the error for all
//   rank r  -> "read/r"       after an error: rank 0, which may keep the store, waits a while for
//   it
//
// Then every rank says in the segment that it is ready and waits until all have said so. After that
// nobody needs the store.
#pragma once

#include <sys/types.h>

#include <chrono>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "base/clock.h"
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
  using ArenaTransport::wait_for_all;

 private:
  void lock_own_byte();

  Segment segment_;
  std::byte* base_ = nullptr;
  size_t bytes_ = 0;
  pid_t owner_ = 0;
};

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

  struct Offer;
  Attached follow();
  Attached attach(const Offer& offer) const;
  [[noreturn]] void rank_0_is_missing();
  void throw_if_error(const std::string& text);

  ArenaLayout layout(size_t slot_bytes) const;
  void watch(const ShmTransport& transport, int first, int last) const;

  void set(const std::string& key, const std::string& value);
  /// Waits until the deadline, and calls `look` every now and then; false if the key did not come.
  bool get(const std::string& key, std::string& value, const std::function<void()>& look = {});

  const TransportConfig& config_;
  Clock::time_point deadline_;
};

}  // namespace dpcomm
