#include "transport/shared_arena.h"

#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <random>
#include <thread>

#include "transport/process.h"
#include "transport/process_memory.h"

namespace dpcomm {
namespace {

constexpr size_t kLaneBudgetBytes = size_t{8} << 20;
constexpr int kSlots = 4;
constexpr size_t kMaxSlotBytes = size_t{256} << 10;
constexpr size_t kMinSlotBytes = size_t{4} << 10;
constexpr int kPorts = 2;
constexpr size_t kMessageBudgetBytes = size_t{4} << 20;  // of the lane of messages, for each rank
constexpr int kMessageSlots = 8;
constexpr size_t kMaxMessageSlotBytes = size_t{128} << 10;
constexpr size_t kTreeLaneShare = 8;  // a tree lane's slots are so many times smaller than lane 0's

constexpr size_t failures_offset() { return sizeof(FailureWord); }
size_t bells_offset(int world) { return failures_offset() + world * sizeof(FailureText); }
size_t lines_offset(int world) { return bells_offset(world) + kPorts * world * sizeof(Bell); }
size_t board_offset(int world) {
  return BoardLayout::to_page(lines_offset(world) + world * sizeof(RankLine));
}

constexpr size_t kMaxBoardSlotBytes = size_t{32} << 10;
constexpr size_t kMaxBounceBytes = size_t{512} << 10;

/// A word that no other process is likely to have.
uint64_t fresh_word() {
  std::random_device random;
  return ((uint64_t{random()} << 32) | random()) | 1;
}

size_t floor_to(size_t value, size_t unit) { return value / unit * unit; }

}  // namespace

size_t ArenaLayout::bytes() const {
  return channel_offset(static_cast<int>(lanes.size()), 0, 0);  // the end of the last lane
}

BoardLayout ArenaLayout::board() const {
  const size_t slot_bytes = lanes[0].slot_bytes;
  return BoardLayout{world, std::min(kMaxBoardSlotBytes, slot_bytes),
                     std::min(kMaxBounceBytes, 2 * slot_bytes)};
}

size_t ArenaLayout::channel_offset(int lane, int from, int to) const {
  const size_t peers = world - 1;
  size_t offset = board_offset(world) + board().bytes();
  for (int i = 0; i < lane; ++i) offset += world * peers * channel_bytes(lanes[i]);
  if (from == to) return offset;  // the end of the lane before; no such channel
  return offset + (from * peers + (to > from ? to - 1 : to)) * channel_bytes(lanes[lane]);
}

std::vector<LaneGeometry> geometry_for(const TransportConfig& config) {
  const size_t peers = config.world > 1 ? config.world - 1 : 1;
  const int slots = config.slots > 0 ? config.slots : kSlots;
  size_t flat = config.slot_bytes;
  if (flat == 0) flat = std::min(kMaxSlotBytes, kLaneBudgetBytes / kSlots / peers);
  flat = std::max(floor_to(flat, kLine), kMinSlotBytes);
  std::vector<LaneGeometry> geometry(config.lanes, LaneGeometry{slots, flat});
  for (int lane = 1; lane < config.lanes; ++lane) {
    geometry[lane].slot_bytes = std::max(floor_to(flat / kTreeLaneShare, kLine), kMinSlotBytes);
  }
  const int message_slots = config.slots > 0 ? config.slots : kMessageSlots;
  const size_t share = kMessageBudgetBytes / kMessageSlots / peers;
  const size_t message = std::min({kMaxMessageSlotBytes, floor_to(share, kLine), flat});
  geometry.push_back(LaneGeometry{message_slots, std::max(message, kMinSlotBytes)});
  return geometry;
}

Error absent_ranks(const std::string& group, const std::vector<Attendant>& ranks,
                   std::chrono::milliseconds timeout) {
  std::string absent, stuck, there;
  int count = 0;
  for (const Attendant& each : ranks) {
    if (each.attendance == Attendance::kAbsent) {
      ++count;
      absent += str(absent.empty() ? "" : ", ", each.rank);
    } else {
      std::string& list = each.attendance == Attendance::kStuck ? stuck : there;
      list += str(list.empty() ? "" : ", ", each.name);
    }
  }
  const std::string limit = str(" within ", timeout.count() / 1000.0, " s");
  std::string text;
  if (!absent.empty()) text = str("rank", count > 1 ? "s " : " ", absent, " did not come", limit);
  if (!stuck.empty()) {
    text += str(text.empty() ? "" : "; ", stuck, " came, but did not get ready", limit);
  }
  if (text.empty()) text = "the start was not complete" + limit;
  if (!there.empty()) text += "; there are " + there;
  return timeout_error("group '", group, "' of ", ranks.size(), " ranks: ", text);
}

Error died_at_start(const std::string& group, int world, const std::string& rank) {
  return peer_error(rank, " died while group '", group, "' of ", world, " ranks started");
}

void ArenaTransport::attach(std::byte* base, uint64_t process) {
  base_ = base;
  board_.emplace(base_ + board_offset(world()), layout_.board(), rank_,
                 &bell(0, Port::kCollectives), kPorts * sizeof(Bell));
  const int lanes = static_cast<int>(layout_.lanes.size());
  senders_.reserve(size_t(lanes) * world());
  receivers_.reserve(size_t(lanes) * world());
  for (int lane = 0; lane < lanes; ++lane) {
    for (int peer = 0; peer < world(); ++peer) {
      const LaneGeometry& geometry = layout_.lanes[lane];
      const Port port = lane == message_lane() ? Port::kMessages : Port::kCollectives;
      Bell& theirs = bell(peer, port);
      senders_.emplace_back(base + layout_.channel_offset(lane, rank_, peer), geometry, theirs);
      receivers_.emplace_back(base + layout_.channel_offset(lane, peer, rank_), geometry, theirs);
    }
  }
  HostName host;
  const std::string name = own_host();
  name.copy(host.letters, sizeof(host.letters) - 1);
  line(rank_).host.write(host);
  line(rank_).pid.store(static_cast<uint32_t>(getpid()));
  line(rank_).process.store(process);
  probed_ = fresh_word();
  line(rank_).word.store(probed_);
  line(rank_).probe.store(reinterpret_cast<uint64_t>(&probed_));
  line(rank_).single_copy_bytes.store(single_copy_wanted());
  allow_reading();
  line(rank_).state.store(RankLine::kAttached);
}

void ArenaTransport::probe_reach() {
  bool all = reading_wanted();
  for (int rank = 0; rank < world() && all; ++rank) {
    uint64_t word = 0;
    all = read_memory(line(rank).pid.load(), line(rank).probe.load(), &word, sizeof(word)) &&
          word == line(rank).word.load();
  }
  line(rank_).reaches.store(all);
}

Reach ArenaTransport::reach() const {
  for (int rank = 0; rank < world(); ++rank) {
    if (line(rank).reaches.load() == 0) return Reach::kNone;
  }
  return Reach::kCopies;
}

size_t ArenaTransport::single_copy_bytes() const {
  uint64_t bytes = 0;
  for (int rank = 0; rank < world(); ++rank) {
    bytes = std::max(bytes, line(rank).single_copy_bytes.load());
  }
  return reach() == Reach::kNone ? SIZE_MAX : bytes;
}

void ArenaTransport::wait_for_all(const TransportConfig& config, Clock::time_point deadline) {
  constexpr auto kLongestPause = std::chrono::microseconds(5000), kFirst = kLongestPause / 256;
  line(rank_).state.store(RankLine::kReady);
  for (auto pause = kFirst;; pause = std::min(pause * 2, kLongestPause)) {
    std::vector<int> absent;
    for (int rank = 0; rank < world(); ++rank) {
      if (line(rank).state.load() < RankLine::kReady) absent.push_back(rank);
    }
    if (absent.empty()) return;  // also if a rank has failed since: its next call tells this one
    if (const auto failure = this->failure()) throw Error(failure->kind, failure->message);
    if (Clock::now() > deadline) {
      raise(absent_ranks(config.name, attendance(RankLine::kReady), config.timeout));
    }
    if (pause == kLongestPause) {  // it lasts
      for (const int rank : absent) {
        if (peer_state(rank) == PeerState::kDead) {
          raise(died_at_start(config.name, world(), describe(rank)));
        }
      }
      if (config.bootstrap != nullptr) config.bootstrap->look();
    }
    std::this_thread::sleep_for(pause);
  }
}

std::vector<Attendant> ArenaTransport::attendance(uint32_t state) const {
  std::vector<Attendant> ranks;
  for (int rank = 0; rank < world(); ++rank) {
    const uint32_t now = line(rank).state.load();
    const Attendance how = now == 0      ? Attendance::kAbsent
                           : now < state ? Attendance::kStuck
                                         : Attendance::kThere;
    ranks.push_back({rank, how, now == 0 ? str("rank ", rank) : describe(rank)});
  }
  return ranks;
}

void ArenaTransport::raise(const Error& error) {
  fail(Failure{error.kind(), error.what()});
  const Failure first = failure().value_or(Failure{error.kind(), error.what()});
  throw Error(first.kind, first.message);
}

Bell& ArenaTransport::bell(int rank, Port port) const {
  const size_t index = size_t(rank) * kPorts + static_cast<size_t>(port);
  return *reinterpret_cast<Bell*>(base_ + bells_offset(world()) + index * sizeof(Bell));
}

void ArenaTransport::ring_all() const {
  for (int rank = 0; rank < world(); ++rank) {
    for (const Port port : {Port::kCollectives, Port::kMessages}) bell(rank, port).ring_always();
  }
}

RankLine& ArenaTransport::line(int rank) const {
  return *reinterpret_cast<RankLine*>(base_ + lines_offset(world()) + rank * sizeof(RankLine));
}

Failures ArenaTransport::failures() const {
  return Failures(*reinterpret_cast<FailureWord*>(base_),
                  reinterpret_cast<FailureText*>(base_ + failures_offset()), world());
}

std::string ArenaTransport::describe(int rank) const {
  const HostName host = line(rank).host.read();
  const std::string_view letters(host.letters, strnlen(host.letters, sizeof(host.letters)));
  return describe_rank(rank, line(rank).pid.load(), printable(letters, letters.size()));
}

void ArenaTransport::fail(const Failure& failure) {
  {
    const std::lock_guard lock(failing_);
    failures().raise(rank_, failure);
  }
  ring_all();
}

void ArenaTransport::close() {
  if (line(rank_).state.exchange(RankLine::kClosed) == RankLine::kClosed) return;
  ring_all();
}

}  // namespace dpcomm
