// transport/slot_ring.h over model::atomic: built by test_plants.py, which rewrites the header.
#include <cstdlib>
#include <cstring>

#include "../check.h"
#include "transport/slot_ring.h"

namespace dpcomm {
namespace {

constexpr std::chrono::seconds kLimit{1};  // which the model does not know
constexpr size_t kSlotBytes = 64;
constexpr int kSeeds = 4000;

struct Channel {
  LaneGeometry lane;
  alignas(kLine) std::byte memory[sizeof(Credits) + 2 * (sizeof(SlotHeader) + kSlotBytes)] = {};
  Bell sender_bell, receiver_bell;
  explicit Channel(int slots) : lane{slots, kSlotBytes} {}
};

template <class Look>
void sleep_until(Bell& bell, Look look) {
  for (;;) {
    if (look()) return;
    const uint32_t ticket = bell.arm();
    if (look()) return bell.disarm();
    bell.sleep(ticket, kLimit);
  }
}

void hand_over(int slots, uint64_t seed) {
  constexpr uint32_t kMessages = 4;
  Channel channel(slots);
  const auto send = [&] {
    SlotSender sender(channel.memory, channel.lane, channel.receiver_bell);
    for (uint32_t i = 1; i <= kMessages; ++i) {
      std::byte* slot = nullptr;
      sleep_until(channel.sender_bell, [&] { return (slot = sender.try_acquire()) != nullptr; });
      std::memcpy(slot, &i, sizeof(i));
      sender.publish(sizeof(i), i);
    }
  };
  const auto receive = [&] {
    SlotReceiver receiver(channel.memory, channel.lane, channel.sender_bell);
    for (uint32_t i = 1; i <= kMessages; ++i) {
      Message message;
      sleep_until(channel.receiver_bell, [&] { return receiver.try_peek(message); });
      uint32_t value;
      std::memcpy(&value, message.data, sizeof(value));
      CHECK_EQ(message.tag, i);
      CHECK_EQ(value, i);
      receiver.release();
    }
  };
  model::World world;
  const bool all_came_to_an_end = world.run(seed, {send, receive});
  CHECK(all_came_to_an_end);
}

TEST(messages_are_handed_over_and_nobody_sleeps_for_ever) {
  for (int seed = 0; seed < kSeeds; ++seed) hand_over(1 + seed % 2, check::seed() + seed);
}

struct Record {
  uint64_t words[3];
};

TEST(a_record_is_read_whole) {
  for (int seed = 0; seed < kSeeds; ++seed) {
    Published<Record> published;
    const auto write = [&] {
      for (uint64_t i = 1; i <= 3; ++i) published.write(Record{{i, i, i}});
    };
    const auto read = [&] {
      uint64_t newest = 0;
      for (int i = 0; i < 3; ++i) {
        const Record record = published.read();
        CHECK(record.words[0] == record.words[1] && record.words[1] == record.words[2]);
        CHECK(record.words[0] >= newest);
        newest = record.words[0];
      }
    };
    model::World world;
    CHECK(world.run(check::seed() + seed, {write, read, read}));
  }
}

TEST(one_failure_is_read_by_all) {
  for (int seed = 0; seed < kSeeds / 4; ++seed) {
    FailureWord word;
    FailureText texts[2];
    const Failures failures(word, texts, 2);
    const auto raise = [&] { failures.raise(0, Failure{ErrorKind::kPeer, "one"}); };
    const auto raise_too = [&] { failures.raise(1, Failure{ErrorKind::kTimeout, "two"}); };
    const auto read = [&] {
      while (!failures.raised()) {
      }
      const auto failure = failures.read();
      CHECK(failure.has_value());
      CHECK_EQ(failure->message, std::string(failure->kind == ErrorKind::kPeer ? "one" : "two"));
    };
    model::World world;
    CHECK(world.run(check::seed() + seed, {raise, raise_too, read, read}));
  }
}

}  // namespace
}  // namespace dpcomm
