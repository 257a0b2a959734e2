// What is fed with bytes from strangers: the parsers of the values of a store, and what reads
// shared memory. Each target takes any bytes; it may throw no more than an Error, and what it
// accepts has to make sense.
#pragma once

#include <array>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "check.h"
#include "comm/communicator.h"
#include "cpu/diagnosis.h"
#include "cpu/messenger.h"
#include "schedule/registry.h"
#include "transport/handshake.h"
#include "transport/process.h"
#include "transport/shared_arena.h"

namespace dpcomm::fuzz {

using Bytes = std::string;

/// Takes values from the front of the bytes; zeros when they are used up.
class Reader {
 public:
  explicit Reader(const Bytes& bytes) : bytes_(bytes) {}

  template <class T>
  T take() {
    T value{};
    const size_t left = bytes_.size() - at_;
    const size_t n = left < sizeof(T) ? left : sizeof(T);
    std::memcpy(static_cast<void*>(&value), bytes_.data() + at_, n);
    at_ += n;
    return value;
  }
  Bytes rest() const { return bytes_.substr(at_); }

 private:
  const Bytes& bytes_;
  size_t at_ = 0;
};

/// Runs a parser; false if it refused. A refusal of what a store holds is an InternalError.
template <class Parse>
bool accepts(Parse&& parse) {
  try {
    parse();
    return true;
  } catch (const Error& error) {
    CHECK(error.kind() == ErrorKind::kInternal);
    CHECK(std::string(error.what()).size() < 512);
    return false;
  }
}

inline void offer(const Bytes& bytes) {
  accepts([&] {
    const Offer offer = Offer::parse(bytes);
    CHECK(offer.pid > 0 && offer.world > 0 && offer.fd >= 0);
    CHECK(offer.slot_bytes > 0 && offer.slot_bytes % 64 == 0);
    CHECK(offer.path.empty() || is_segment_path(offer.path));
    CHECK_EQ(Offer::parse(offer.text()).text(), offer.text());
    TransportConfig config;
    config.world = 4;
    config.lanes = 3;
    config.slot_bytes = offer.slot_bytes;
    const ArenaLayout layout{config.world, geometry_for(config)};
    CHECK(layout.bytes() > offer.slot_bytes);  // no overflow
  });
}

inline void presence(const Bytes& bytes) {
  accepts([&] {
    const Presence presence = Presence::parse(bytes);
    CHECK_EQ(Presence::parse(presence.text()).text(), presence.text());
    (void)presence.gone();
    CHECK(describe_rank(1, presence.pid, presence.host).size() < 256);
  });
}

inline void words(const Bytes& bytes) {
  accepts([&] {
    if (const auto error = parse_error(bytes)) {
      CHECK(error->kind() <= ErrorKind::kInternal);
      const auto again = parse_error(error_text(*error));
      CHECK(again && std::string(again->what()) == error->what());
    }
  });
  accepts([&] {
    if (const auto why = parse_answer(bytes)) CHECK(why->size() <= bytes.size());
  });
  accepts([&] { parse_verdict(bytes); });
  accepts([&] { CHECK_EQ(parse_group_name(bytes, "pg").size(), size_t{19}); });
}

inline void text(const Bytes& bytes) {
  const size_t limit = bytes.empty() ? 0 : static_cast<uint8_t>(bytes[0]);
  const std::string clean = printable(bytes, limit);
  CHECK(clean.size() <= limit);
  CHECK_EQ(printable(clean, limit), clean);
}

/// Memory that looks like a segment of two ranks, as far as the bytes of the other rank go.
class Arena final : public ArenaTransport {
 public:
  static constexpr int kWorld = 2;

  explicit Arena(int rank = 0) : Arena(rank, layout_of()) {}

  PeerState peer_state(int rank) const override {
    return static_cast<PeerState>(line(rank).state.load() % 3);
  }
  RankLine& peer() const { return line(1); }
  FailureWord& failure_word() const { return *reinterpret_cast<FailureWord*>(base()); }
  /// The first slot of what rank 1 sends to rank 0 in a lane.
  SlotHeader& first_slot(int lane) const {
    std::byte* channel = base() + layout().channel_offset(lane, 1, 0);
    return *reinterpret_cast<SlotHeader*>(channel + sizeof(Credits));
  }
  /// The slot of the n-th message from rank 1, from 0.
  SlotHeader& slot(int lane, size_t n) const {
    const LaneGeometry& geometry = layout().lanes[lane];
    std::byte* first = reinterpret_cast<std::byte*>(&first_slot(lane));
    const size_t stride = sizeof(SlotHeader) + geometry.slot_bytes;
    return *reinterpret_cast<SlotHeader*>(first + n % geometry.slots * stride);
  }
  Credits& credits(int lane) const {
    return *reinterpret_cast<Credits*>(base() + layout().channel_offset(lane, 0, 1));
  }

 private:
  struct Free {
    void operator()(std::byte* memory) const { std::free(memory); }
  };

  Arena(int rank, ArenaLayout made) : ArenaTransport(rank, made), bytes_(made.bytes()) {
    memory_.reset(static_cast<std::byte*>(std::aligned_alloc(4096, (bytes_ + 4095) / 4096 * 4096)));
    std::memset(memory_.get(), 0, bytes_);
    attach(memory_.get());
  }
  static ArenaLayout layout_of() {
    TransportConfig config;
    config.world = kWorld;
    config.lanes = channel_lanes();
    config.slot_bytes = 4096;
    config.slots = 2;
    return ArenaLayout{kWorld, geometry_for(config)};
  }

  size_t bytes_;
  std::unique_ptr<std::byte, Free> memory_;
};

inline void failure(const Bytes& bytes) {
  FailureWord word;
  alignas(kLine) std::array<char, sizeof(FailureText)> memory{};
  auto* text = new (memory.data()) FailureText;
  Reader reader(bytes);
  word.first.store(reader.take<uint8_t>());
  text->kind = reader.take<uint32_t>();
  text->text_bytes = reader.take<uint32_t>();
  const Bytes rest = reader.rest();
  std::memcpy(text->text, rest.data(), std::min(rest.size(), FailureText::kTextBytes));
  const Failures failures(word, text, 1);
  const auto failure = failures.read();
  CHECK_EQ(failure.has_value(), failures.raised());
  if (!failure) return;
  CHECK(failure->kind <= ErrorKind::kInternal);
  CHECK(failure->message.size() <= FailureText::kTextBytes);
  CHECK_EQ(printable(failure->message, FailureText::kTextBytes), failure->message);
}

/// What a rank says of itself.
inline void records(const Bytes& bytes) {
  static Arena arena;
  Reader reader(bytes);
  const auto own_sequence = reader.take<uint8_t>();
  for (Place place : {Place::kHost, Place::kDevice}) {
    OpRecord own;
    own.sequence = own_sequence;
    arena.announce(own, place);
    for (int i = 0; i < 3; ++i) arena.peer().history(place).announce(reader.take<OpRecord>());
    arena.peer().history(place).last.store(reader.take<uint64_t>());
  }
  arena.peer().state.store(reader.take<uint32_t>());
  arena.peer().pid.store(reader.take<uint32_t>());
  arena.peer().host.write(reader.take<HostName>());
  CHECK(arena.describe(1).size() < 256);
  for (Place place : {Place::kHost, Place::kDevice}) {
    const Diagnosis diagnosis(arena, place);
    const OpRecord own = arena.announced(0, place);
    CHECK(describe(arena.announced(1, place)).size() < 512);
    CHECK(fingerprint(arena.announced(1, place)) != 0);
    CHECK(!diagnosis.report(own).empty());
    diagnosis.history(1);
    diagnosis.not_called(own);
    diagnosis.not_moving(own);
    try {
      diagnosis.check_disagreement(own);
      diagnosis.check_peers(own);
      diagnosis.check_disagreement(arena.announced(1, place));
    } catch (const Error& error) {
      CHECK(error.kind() == ErrorKind::kUsage || error.kind() == ErrorKind::kPeer);
    }
  }
}

/// Messages in the slots, with any header and any payload.
inline void messages(const Bytes& bytes) {
  Reader reader(bytes);
  const auto how = reader.take<uint8_t>();
  auto transport = std::make_unique<Arena>();
  Arena& arena = *transport;
  CommunicatorOptions options;
  options.transport = "inproc";
  options.wire_on_all_links = true;
  options.timeout = std::chrono::milliseconds(1);
  Operation operation;
  static constexpr const char* kNames[] = {"two_shot", "ring", "one_shot", "double_tree"};
  operation.algorithm = kNames[how % 4];
  static constexpr WireFormat kWires[] = {WireFormat::kNative, WireFormat::kFp16, WireFormat::kInt8,
                                          WireFormat::kBf16};
  operation.wire = kWires[how / 4 % 4];
  operation.count = 1 + reader.take<uint8_t>();
  std::vector<float> values(operation.count, 1);
  operation.input = operation.output = values.data();
  OpRecord expected;
  Communicator communicator(std::move(transport), options);
  const auto [name, wire] = communicator.choice(operation);
  expected.sequence = 1;
  expected.count = operation.count;
  expected.wire = static_cast<uint8_t>(wire);
  expected.algorithm = static_cast<uint8_t>(find_algorithm(Collective::kAllReduce, name));
  const auto header_bytes = reader.take<uint32_t>();
  const auto tag = reader.take<uint32_t>();
  const auto released = reader.take<uint32_t>();
  const Bytes payload = reader.rest();
  for (int lane = 0; lane < channel_lanes(); ++lane) {
    SlotHeader& slot = arena.first_slot(lane);
    slot.bytes = how & 64 ? header_bytes % 2048 : header_bytes;
    slot.tag = how & 128 ? tag : fingerprint(expected);
    auto* at = reinterpret_cast<char*>(&slot) + sizeof(SlotHeader);
    std::memcpy(at, payload.data(), std::min<size_t>(payload.size(), 4096));
    slot.turn.store(1);
    arena.credits(lane).released.store(released);
  }
  try {
    communicator.run(operation);
  } catch (const Error&) {
  }
}

/// Packets of messages between two ranks, in any order, with any header.
inline void packets(const Bytes& bytes) {
  Reader reader(bytes);
  Arena arena;
  Messenger messenger(arena);
  std::vector<std::vector<std::byte>> buffers;
  const auto post = [&](bool sends, int peer, uint32_t tag, size_t size) {
    buffers.emplace_back(size);
    auto transfer = std::make_shared<Transfer>();
    transfer->sends = sends;
    transfer->peer = peer;
    transfer->tag = tag;
    transfer->data = buffers.back().data();
    transfer->bytes = size;
    transfer->deadline = Clock::now() + std::chrono::hours(1);
    messenger.post(std::move(transfer));
  };
  const int lane = arena.message_lane();
  const auto most = static_cast<uint32_t>(arena.geometry(lane).slot_bytes);
  try {
    post(false, 1, 1, 100);
    post(false, Transfer::kAnyPeer, 2, 5000);
    post(true, 1, 3, 100);
    post(true, 1, 4, 20000);
    for (uint32_t number = 0; number < 12; ++number) {
      const auto how = reader.take<uint8_t>();
      // As messenger.h has it: kind, id, tag, comes_along, bytes, offset.
      uint32_t head[8] = {
          how % 4u, reader.take<uint8_t>() % 3u, 1u + how / 4 % 4, how >> 4 & 1u, 0, 0, 0, 0};
      head[4] = how & 32 ? reader.take<uint32_t>() : 100;
      head[6] = how & 64 ? reader.take<uint32_t>() : 0;
      SlotHeader& slot = arena.slot(lane, number);
      auto* at = reinterpret_cast<std::byte*>(&slot) + sizeof(SlotHeader);
      std::memset(at, 0, 128);
      std::memcpy(at, head, sizeof(head));
      const auto answer = reader.take<uint16_t>();
      const uint32_t answers[2] = {answer % 3u, answer / 3u % 2};
      if (how % 4 == 2) std::memcpy(at + 64, answers, sizeof(answers));
      const uint32_t usual = how % 4 == 2 ? 72 : head[3] != 0 || how % 4 == 3 ? 164 : 64;
      slot.bytes = how & 128 ? reader.take<uint32_t>() % (2 * most) : usual;
      slot.tag = number + 1;
      slot.turn.store(number + 1);
      arena.credits(lane).released.store(reader.take<uint8_t>() % 4 + number);
      messenger.progress();
      messenger.check();
    }
  } catch (const Error& error) {
    CHECK(!std::string(error.what()).empty());
  }
  messenger.abandon();
}

struct Target {
  const char* name;
  void (*run)(const Bytes&);
  std::vector<Bytes> seeds;
};

inline const std::vector<Target>& targets() {
  static const std::vector<Target> all = {
      {"offer",
       offer,
       {"segment 4711 4026531836 99 4 7 262144 12345678901234567890 ",
        "segment 1 0 0 2 3 4096 7 /dev/shm/dpcomm-0123456789abcdef"}},
      {"presence", presence, {"process 4711 4026531836 123456 node1"}},
      {"words",
       words,
       {"error 1 rank 2 died", "ok", "no room", "go", "again", "0123456789abcdef-pg"}},
      {"text", text, {"\x7f plain \xc3\xa4\xe2\x82\xac\xf0\x9f\x98\x80"}},
      {"failure", failure, {Bytes("\1\1\0\0\0\5\0\0\0rank!", 14)}},
      {"records", records, {Bytes(512, '\1'), Bytes(512, '\0')}},
      {"packets",
       packets,
       {Bytes("\x11\0\0\0\0", 5), Bytes("\1\0\0\0\0\3\0\0\0\0", 10),
        Bytes("\2\0\0\0\0\2\0\1\0\0", 10)}},
      {"messages",
       messages,
       {Bytes("\0\x0a\x28\0\0\0\0\0\0\0\0\0\0\0payload", 21),
        Bytes("\x49\x40\x80\0\0\0\0\0\0\0\0\0\0\0payload", 21)}},
  };
  return all;
}

}  // namespace dpcomm::fuzz
