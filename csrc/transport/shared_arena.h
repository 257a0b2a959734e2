// A transport over memory that all ranks map: the common part of shm (processes) and inproc
// (threads). A derived class brings the memory and knows whether a peer lives.
#pragma once

#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "base/clock.h"
#include "transport/board.h"
#include "transport/slot_ring.h"
#include "transport/transport.h"

namespace dpcomm {

/// What an arena looks like; computed alike on all ranks.
///
///   whose failure was first | failure of each rank | bells of each rank, a port each |
///   line of each rank | board | channels by lane, from, to
struct ArenaLayout {
  int world = 0;
  std::vector<LaneGeometry> lanes;

  size_t bytes() const;
  BoardLayout board() const;
  size_t channel_offset(int lane, int from, int to) const;
  int message_lane() const { return static_cast<int>(lanes.size()) - 1; }
};

/// Slots of the lanes of schedules and, last, of the lane of messages. By default the memory of
/// lane 0 is about the same for every rank whatever the world, unless slots would become tiny; the
/// other lanes' slots are smaller. So it is with the lane of messages, which has a budget of its
/// own.
std::vector<LaneGeometry> geometry_for(const TransportConfig& config);

/// How far a rank has come at the start of a group.
enum class Attendance { kAbsent, kStuck, kThere };

/// One rank at the start of a group.
struct Attendant {
  int rank = 0;
  Attendance attendance = Attendance::kAbsent;
  std::string name;  ///< "rank 1 (pid 4711, host node1)"; "rank 1" of one that has not come
};

/// "group 'default' of 4 ranks: ranks 1, 3 did not come within 2 s; there are rank 0 (pid 4709,
/// host node1), rank 2 (pid 4711, host node1)". Of all ranks, ascending.
Error absent_ranks(const std::string& group, const std::vector<Attendant>& ranks,
                   std::chrono::milliseconds timeout);
/// "rank 2 (pid 4711, host node1) died while group 'default' of 4 ranks started".
Error died_at_start(const std::string& group, int world, const std::string& rank);

class ArenaTransport : public Transport {
 public:
  int rank() const override { return rank_; }
  int world() const override { return layout_.world; }
  LaneGeometry geometry(int lane) const override { return layout_.lanes[lane]; }
  int message_lane() const override { return layout_.message_lane(); }
  SendChannel& send_channel(int peer, int lane) override { return senders_[index(peer, lane)]; }
  RecvChannel& recv_channel(int peer, int lane) override { return receivers_[index(peer, lane)]; }

  Board* board() override { return &*board_; }
  Reach reach() const override;
  size_t single_copy_bytes() const override;
  uint32_t process_id(int rank) const override { return line(rank).pid.load(); }

  uint32_t arm(Port port) override { return bell(rank_, port).arm(); }
  void disarm(Port port) override { bell(rank_, port).disarm(); }
  void sleep(Port port, uint32_t ticket, std::chrono::nanoseconds limit) override {
    bell(rank_, port).sleep(ticket, limit);
  }
  void wake(Port port) override { bell(rank_, port).ring_always(); }

  void announce(const OpRecord& record, Place place) override {
    line(rank_).history(place).announce(record);
  }
  OpRecord announced(int rank, Place place) const override {
    return line(rank).history(place).last_record();
  }
  OpRecord announced_at(int rank, uint64_t sequence, Place place) const override {
    return line(rank).history(place).record_of(sequence);
  }
  std::string describe(int rank) const override;
  void fail(const Failure& failure) override;
  std::optional<Failure> failure() const override { return failures().read(); }
  bool failed() const override { return failures().raised(); }
  void close() override;

 protected:
  /// Zeroed memory of layout.bytes() at `base` is an arena that nobody uses yet.
  ArenaTransport(int rank, ArenaLayout layout) : rank_(rank), layout_(std::move(layout)) {}

  /// Builds the channels; the memory has to live until the object is gone.
  void attach(std::byte* base, uint64_t process = 0);
  /// Finds out whether this rank may read the memory of all the others, who have attached.
  void probe_reach();
  /// Says that this rank needs nothing more to start, and returns once every rank has said so.
  /// Throws, with the same text on all ranks, a TimeoutError naming those that have not by the
  /// deadline, or a PeerError naming one that died.
  void wait_for_all(const TransportConfig& config, Clock::time_point deadline);

  /// Throws the error, or the one that another rank has raised before, and tells all ranks.
  [[noreturn]] void raise(const Error& error);
  /// The ranks by their lines: there are those whose state is at least `state`.
  std::vector<Attendant> attendance(uint32_t state) const;

  RankLine& line(int rank) const;
  std::byte* base() const { return base_; }
  const ArenaLayout& layout() const { return layout_; }

 private:
  size_t index(int peer, int lane) const { return size_t(lane) * layout_.world + peer; }
  Bell& bell(int rank, Port port) const;
  void ring_all() const;
  Failures failures() const;

  int rank_;
  ArenaLayout layout_;
  std::byte* base_ = nullptr;
  std::mutex failing_;  // guards this rank's text
  std::optional<Board> board_;
  uint64_t probed_ = 0;  // what the others read to see whether they can; != 0
  std::vector<SlotSender> senders_;
  std::vector<SlotReceiver> receivers_;
};

}  // namespace dpcomm
