// Channels, bells, records and failure records alone (transport/slot_ring.h), two threads and more.
#include "transport/slot_ring.h"

#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstdlib>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "check.h"

namespace dpcomm {
namespace {

using std::chrono::nanoseconds;
using std::chrono::steady_clock;

constexpr std::chrono::seconds kNever{6};  // a sleep that lasts so long was not ended by a ring
constexpr size_t kSlotBytes = 256;
constexpr size_t kWords = kSlotBytes / sizeof(uint32_t);

int scaled(int count) { return check::long_run() ? 20 * count : count; }

struct FreeMemory {
  void operator()(std::byte* memory) const { std::free(memory); }
};

/// A channel between two threads, with the bells of both.
struct Channel {
  LaneGeometry lane;
  std::unique_ptr<std::byte, FreeMemory> memory;
  Bell sender_bell, receiver_bell;

  /// All words of the channel as they are after `first` messages.
  explicit Channel(int slots, uint32_t first = 0) : lane{slots, kSlotBytes} {
    const size_t bytes = channel_bytes(lane);
    memory.reset(static_cast<std::byte*>(std::aligned_alloc(kLine, bytes)));
    std::memset(memory.get(), 0, bytes);
    new (memory.get()) Credits;
    reinterpret_cast<Credits*>(memory.get())->released.store(first);
    for (int slot = 0; slot < slots; ++slot) {
      std::byte* at = memory.get() + sizeof(Credits) + slot * (sizeof(SlotHeader) + kSlotBytes);
      (new (at) SlotHeader)->turn.store(first);
    }
  }
};

/// What an executor does, in short: look; arm, look once more, sleep.
template <class Look>
void wait_for(Bell& bell, bool sleepy, Look look) {
  for (;;) {
    for (int i = 0; i < 20; ++i) {
      if (look()) return;
      if (!sleepy) std::this_thread::yield();
    }
    if (!sleepy) continue;
    const uint32_t ticket = bell.arm();
    if (look()) {
      bell.disarm();
      return;
    }
    const auto began = steady_clock::now();
    bell.sleep(ticket, kNever);
    CHECK(steady_clock::now() - began < kNever);  // else a ring was lost
  }
}

uint32_t word(uint32_t message, size_t at) { return message * 2654435761u + uint32_t(at); }
uint32_t bytes_of(uint32_t message) { return message % (kWords + 1) * sizeof(uint32_t); }

void send_messages(Channel& channel, uint32_t first, int messages, bool sleepy) {
  SlotSender sender(channel.memory.get(), channel.lane, channel.receiver_bell, first);
  for (int i = 0; i < messages; ++i) {
    const uint32_t message = first + 1 + i;
    std::byte* slot = nullptr;
    wait_for(channel.sender_bell, sleepy, [&] { return (slot = sender.try_acquire()) != nullptr; });
    CHECK(sender.try_acquire() == slot);  // until it is published
    auto* words = reinterpret_cast<uint32_t*>(slot);
    for (size_t at = 0; at < kWords; ++at) words[at] = word(message, at);
    sender.publish(bytes_of(message), ~message);
  }
}

void receive_messages(Channel& channel, uint32_t first, int messages, bool sleepy) {
  SlotReceiver receiver(channel.memory.get(), channel.lane, channel.sender_bell, first);
  std::minstd_rand random(static_cast<uint32_t>(check::seed()));
  for (int i = 0; i < messages; ++i) {
    const uint32_t expected = first + 1 + i;
    Message message;
    wait_for(channel.receiver_bell, sleepy, [&] { return receiver.try_peek(message); });
    if (random() % 64 == 0) std::this_thread::yield();  // the sender runs ahead
    CHECK_EQ(message.tag, ~expected);
    CHECK_EQ(message.bytes, bytes_of(expected));
    const auto* words = reinterpret_cast<const uint32_t*>(message.data);
    for (size_t at = 0; at < kWords; ++at) CHECK_EQ(words[at], word(expected, at));
    receiver.release();
  }
  Message message;
  CHECK(!receiver.try_peek(message));
}

void pass_messages(int slots, uint32_t first, int messages, bool sleepy) {
  Channel channel(slots, first);
  std::thread sender([&] { send_messages(channel, first, messages, sleepy); });
  receive_messages(channel, first, messages, sleepy);
  sender.join();
}

TEST(messages_arrive_whole_and_in_order) {
  for (int slots = 1; slots <= 5; ++slots) pass_messages(slots, 0, scaled(3000), false);
}

TEST(the_turn_wraps_around) {
  for (int slots = 1; slots <= 5; ++slots) {
    for (uint32_t before : {1u, 2u, 7u, 100u}) pass_messages(slots, 0u - before, 300, false);
  }
}

TEST(a_ring_ends_a_sleep) {
  for (int slots = 1; slots <= 5; ++slots) pass_messages(slots, 0, scaled(2000), true);
}

TEST(a_sender_never_has_more_slots_than_there_are) {
  for (int slots = 1; slots <= 5; ++slots) {
    Channel channel(slots);
    SlotSender sender(channel.memory.get(), channel.lane, channel.receiver_bell);
    SlotReceiver receiver(channel.memory.get(), channel.lane, channel.sender_bell);
    Message message;
    for (int i = 0; i < slots; ++i) {
      CHECK(sender.try_acquire() != nullptr);
      sender.publish(4, 1);
    }
    CHECK(sender.try_acquire() == nullptr);
    CHECK(receiver.try_peek(message));
    CHECK(sender.try_acquire() == nullptr);  // peeked is not released
    receiver.release();
    CHECK(sender.try_acquire() != nullptr);
  }
}

TEST(what_is_not_published_is_not_seen) {
  Channel channel(2);
  SlotSender sender(channel.memory.get(), channel.lane, channel.receiver_bell);
  SlotReceiver receiver(channel.memory.get(), channel.lane, channel.sender_bell);
  std::memset(sender.try_acquire(), 0xff, kSlotBytes);
  Message message;
  CHECK(!receiver.try_peek(message));
}

/// Both ends of two channels sleep whenever they can: a lost ring shows as a sleep that lasts.
TEST(no_ring_is_lost_in_ping_pong) {
  Channel there(1), back(1);
  const int rounds = scaled(20000);
  std::thread echo([&] {
    SlotReceiver in(there.memory.get(), there.lane, there.sender_bell);
    SlotSender out(back.memory.get(), back.lane, back.receiver_bell);
    Message message;
    for (int i = 0; i < rounds; ++i) {
      wait_for(there.receiver_bell, true, [&] { return in.try_peek(message); });
      in.release();
      wait_for(back.sender_bell, true, [&] { return out.try_acquire() != nullptr; });
      out.publish(0, message.tag);
    }
  });
  SlotSender out(there.memory.get(), there.lane, there.receiver_bell);
  SlotReceiver in(back.memory.get(), back.lane, back.sender_bell);
  Message message;
  for (int i = 0; i < rounds; ++i) {
    wait_for(there.sender_bell, true, [&] { return out.try_acquire() != nullptr; });
    out.publish(0, i);
    wait_for(back.receiver_bell, true, [&] { return in.try_peek(message); });
    CHECK_EQ(message.tag, static_cast<uint32_t>(i));
    in.release();
  }
  echo.join();
}

TEST(a_bell_takes_many_ringers) {
  Bell bell;
  std::atomic<int> given{0};
  std::atomic<bool> over{false};
  const int rounds = scaled(500);
  std::vector<std::thread> ringers;
  for (int i = 0; i < 3; ++i) {
    ringers.emplace_back([&] {
      for (int round = 0; round < rounds; ++round) {
        given.fetch_add(1);
        bell.ring();
        if (round % 16 == 0) std::this_thread::yield();
      }
    });
  }
  int seen = 0;
  while (seen < 3 * rounds) {
    wait_for(bell, true, [&] { return given.load() > seen; });
    seen = given.load();
  }
  for (auto& ringer : ringers) ringer.join();
  std::thread waker([&] {  // ring_always() ends a sleep although nothing was announced
    over.store(true);
    bell.ring_always();
  });
  wait_for(bell, true, [&] { return over.load(); });
  waker.join();
}

struct Record {
  uint64_t words[6];
};

TEST(a_published_record_is_read_whole) {
  Published<Record> published;
  const int reads = scaled(50000);
  std::atomic<int> reading{2};
  const auto read = [&] {
    uint64_t newest = 0;
    const auto enough = std::chrono::steady_clock::now() + std::chrono::seconds(20);
    for (int i = 0; i < reads && std::chrono::steady_clock::now() < enough; ++i) {
      const Record record = published.read();
      for (uint64_t word : record.words) CHECK_EQ(word, record.words[0]);
      if (record.words[0] == 0) continue;  // none could be read whole, or none is there yet
      CHECK(record.words[0] >= newest);
      newest = record.words[0];
    }
    reading.fetch_sub(1);
  };
  std::thread first(read), second(read);
  uint64_t number = 0;
  while (reading.load() > 0 || number == 0) {
    Record record;
    ++number;
    for (uint64_t& word : record.words) word = number;
    published.write(record);
    // A writer that never rests could keep a slow machine's readers from ever seeing a whole
    // record.
    if (number % 64 == 0) std::this_thread::sleep_for(std::chrono::microseconds(20));
  }
  first.join();
  second.join();
  CHECK_EQ(published.read().words[5], number);
}

/// What a segment of four ranks has for failures.
struct Board {
  FailureWord word;
  FailureText texts[4];
  Failures failures{word, texts, 4};
};

TEST(the_first_failure_wins) {
  for (int round = 0; round < scaled(50); ++round) {
    auto board = std::make_unique<Board>();
    const Failures& failures = board->failures;
    CHECK(!failures.raised());
    CHECK(!failures.read().has_value());
    std::vector<std::thread> threads;
    std::atomic<int> start{0};
    std::string seen[4];
    for (int i = 0; i < 4; ++i) {
      threads.emplace_back([&, i] {
        start.fetch_add(1);
        while (start.load() < 4) std::this_thread::yield();
        if (i < 3) {
          failures.raise(i, Failure{ErrorKind::kTimeout, std::string(50 + i, char('a' + i))});
        }
        while (!failures.raised()) std::this_thread::yield();
        const auto failure = failures.read();
        CHECK(failure.has_value());
        CHECK(failure->kind == ErrorKind::kTimeout);
        seen[i] = failure->message;
      });
    }
    for (auto& thread : threads) thread.join();
    CHECK_EQ(seen[0], std::string(50 + seen[0][0] - 'a', seen[0][0]));
    for (const std::string& each : seen) CHECK_EQ(each, seen[0]);
    for (int i = 0; i < 4; ++i) failures.raise(i, Failure{ErrorKind::kUsage, "later"});
    const auto still = failures.read();
    CHECK_EQ(still->message, seen[0]);
  }
}

TEST(a_long_failure_text_is_cut) {
  auto board = std::make_unique<Board>();
  const std::string text(FailureText::kTextBytes + 1000, 'x');
  board->failures.raise(3, Failure{ErrorKind::kPeer, text});
  const auto failure = board->failures.read();
  CHECK_EQ(failure->message, text.substr(0, FailureText::kTextBytes));
}

/// Dies in the middle of its text: a page of it is not there.
[[noreturn]] void die_while_reporting(Board& board, int rank, const std::string& text) {
  constexpr uintptr_t kPage = 4096;
  signal(SIGSEGV, SIG_DFL);
  const auto middle = reinterpret_cast<uintptr_t>(board.texts[rank].text) + text.size() / 2;
  mprotect(reinterpret_cast<void*>(middle / kPage * kPage), kPage, PROT_NONE);
  board.failures.raise(rank, Failure{ErrorKind::kTimeout, text});
  _exit(0);  // which is an error
}

/// A process that dies while it reports a failure, or is killed about then: there is its whole text
/// or none; where there is none, the other rank's text is everybody's.
TEST(a_rank_that_is_killed_while_it_reports_a_failure) {
  const size_t bytes = (sizeof(Board) + 4095) / 4096 * 4096;
  const std::string theirs(FailureText::kTextBytes, 't');
  std::mt19937_64 random(check::seed());
  for (int round = 0; round < scaled(100); ++round) {
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(memory != MAP_FAILED);
    auto* board = new (memory) Board;
    const bool in_the_window = round % 2 == 0;
    const pid_t child = fork();
    if (child == 0) {
      if (in_the_window) die_while_reporting(*board, 2, theirs);
      board->failures.raise(2, Failure{ErrorKind::kTimeout, theirs});
      for (;;) pause();
    }
    int status = 0;
    if (!in_the_window) {
      std::this_thread::sleep_for(std::chrono::microseconds(random() % 700));
      kill(child, SIGKILL);
    }
    CHECK_EQ(waitpid(child, &status, 0), child);
    CHECK(WIFSIGNALED(status));
    const bool reported = board->failures.raised();
    CHECK(!reported || !in_the_window);
    const auto began = std::chrono::steady_clock::now();
    board->failures.raise(1, Failure{ErrorKind::kPeer, "rank 2 died"});
    const auto failure = board->failures.read();
    CHECK(std::chrono::steady_clock::now() - began < std::chrono::seconds(1));
    CHECK(failure.has_value());
    CHECK_EQ(failure->message, reported ? theirs : std::string("rank 2 died"));
    CHECK(failure->kind == (reported ? ErrorKind::kTimeout : ErrorKind::kPeer));
    munmap(memory, bytes);
  }
}

}  // namespace
}  // namespace dpcomm
