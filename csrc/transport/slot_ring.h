// Channels in memory that both ends map, and every explicit memory order of the CPU side.
//
// A channel is a ring of K slots and one line of credits:
//
//   credits | header 0 | payload 0 | header 1 | payload 1 | ... | header K-1 | payload K-1
//
// Message m (from 1) travels in slot (m - 1) mod K. The sender fills the slot's payload and header
// and publishes by writing m into the header's `turn`; the receiver polls `turn` of the slot that
// comes next, reads, and gives the slot back by counting up `released` in the credit line. Each
// word has one writer. Slots 2 and more let a fused receive-and-send step make progress (law 3).
//
// Sleeping is a store-buffer (Dekker) pattern: the sleeper writes `asleep`, then reads `turn` or
// `released`; the other side writes those, then reads `asleep`. All four are seq_cst, so at least
// one side sees the other, and no wake-up is lost. There are no fences here: TSan does not know
// them.
#pragma once

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <climits>
#include <cstring>
#include <ctime>
#include <optional>
#include <string>
#include <string_view>
#include <type_traits>

#include "base/text.h"
#include "transport/channel.h"

namespace dpcomm {

inline constexpr size_t kLine = 64;  // bytes of a cache line; payloads start on one

static_assert(std::atomic<uint32_t>::is_always_lock_free);
static_assert(std::atomic<uint64_t>::is_always_lock_free);

/// Where a rank sleeps. Zero bytes are a valid initial state, as for everything in shared memory.
struct alignas(kLine) Bell {
  std::atomic<uint32_t> rung{0};
  std::atomic<uint32_t> asleep{0};

  /// The sleeper: announces itself; afterwards it looks at its channels once more.
  uint32_t arm() {
    const uint32_t ticket = rung.load(std::memory_order_seq_cst);
    // seq_cst: ordered before the look at turn/released; pairs with the load in ring().
    asleep.store(1, std::memory_order_seq_cst);
    return ticket;
  }
  void disarm() {
    asleep.store(0, std::memory_order_relaxed);
  }  // own flag; a late ring is harmless

  void sleep(uint32_t ticket, std::chrono::nanoseconds limit) {
    timespec wait{static_cast<time_t>(limit.count() / 1000000000),
                  static_cast<long>(limit.count() % 1000000000)};
    // The kernel compares `rung` with the ticket under its own lock: a ring after arm() is not
    // lost.
    syscall(SYS_futex, reinterpret_cast<uint32_t*>(&rung), FUTEX_WAIT, ticket, &wait, nullptr, 0);
    disarm();
  }

  /// The other side: called after turn or released was written (seq_cst).
  void ring() {
    // seq_cst: pairs with the store in arm(). The exchange lets one of several ringers do the call.
    if (asleep.load(std::memory_order_seq_cst) == 0) return;
    if (asleep.exchange(0, std::memory_order_seq_cst) == 0) return;
    ring_always();
  }
  void ring_always() {
    rung.fetch_add(1, std::memory_order_seq_cst);
    syscall(SYS_futex, reinterpret_cast<uint32_t*>(&rung), FUTEX_WAKE, INT_MAX, nullptr, nullptr,
            0);
  }
};

struct alignas(kLine) SlotHeader {
  std::atomic<uint32_t> turn{0};
  uint32_t bytes = 0;
  uint32_t tag = 0;
};

struct alignas(kLine) Credits {
  std::atomic<uint32_t> released{0};
};

static_assert(sizeof(Bell) == kLine && sizeof(SlotHeader) == kLine && sizeof(Credits) == kLine);

/// Bytes of a channel.
inline size_t channel_bytes(const LaneGeometry& lane) {
  return sizeof(Credits) + lane.slots * (sizeof(SlotHeader) + lane.slot_bytes);
}

/// What both ends of a channel know of its memory.
class SlotRing {
 public:
  SlotRing(std::byte* base, const LaneGeometry& lane)
      : base_(base), slots_(lane.slots), stride_(sizeof(SlotHeader) + lane.slot_bytes) {}

 protected:
  Credits& credits() const { return *reinterpret_cast<Credits*>(base_); }
  /// The slot of the message that comes next at this end.
  SlotHeader& current() const {
    return *reinterpret_cast<SlotHeader*>(base_ + sizeof(Credits) + position_ * stride_);
  }
  void advance() { position_ = position_ + 1 == slots_ ? 0 : position_ + 1; }
  /// Bytes of a message as its header says, but never more than a slot has: the header lies in
  /// memory that others write to.
  uint32_t bytes_in(const SlotHeader& header) const {
    const size_t most = stride_ - sizeof(SlotHeader);
    return static_cast<uint32_t>(std::min<size_t>(header.bytes, most));
  }
  static std::byte* payload(SlotHeader& header) {
    return reinterpret_cast<std::byte*>(&header) + sizeof(SlotHeader);
  }
  uint32_t slots() const { return slots_; }

 private:
  std::byte* base_;
  uint32_t slots_;
  uint32_t position_ = 0;
  size_t stride_;
};

class SlotSender final : public SendChannel, SlotRing {
 public:
  /// `first`: messages before this one, which is 0 but for tests of the wrap-around; all words of
  /// the channel have to hold it then.
  SlotSender(std::byte* base, const LaneGeometry& lane, Bell& receiver, uint32_t first = 0)
      : SlotRing(base, lane), receiver_(receiver), sent_(first), released_(first) {}

  std::byte* try_acquire() override {
    if (sent_ - released_ >= slots()) {
      // seq_cst: pairs with release() in SlotReceiver (the receiver has read the slot), and is the
      // sleeper's second look after Bell::arm().
      released_ = credits().released.load(std::memory_order_seq_cst);
      if (sent_ - released_ >= slots()) return nullptr;
    }
    return payload(current());
  }

  void publish(uint32_t bytes, uint32_t tag) override {
    SlotHeader& slot = current();
    slot.bytes = bytes;
    slot.tag = tag;
    // seq_cst: makes payload and header visible to try_peek(), and comes before ring()'s load.
    slot.turn.store(++sent_, std::memory_order_seq_cst);
    advance();
    receiver_.ring();
  }

 private:
  Bell& receiver_;
  uint32_t sent_;      // messages published; wraps, only differences and equality are used
  uint32_t released_;  // last seen
};

class SlotReceiver final : public RecvChannel, SlotRing {
 public:
  SlotReceiver(std::byte* base, const LaneGeometry& lane, Bell& sender, uint32_t first = 0)
      : SlotRing(base, lane), sender_(sender), received_(first) {}

  bool try_peek(Message& message) override {
    SlotHeader& slot = current();
    // seq_cst: pairs with publish() in SlotSender; makes the slot's bytes visible. Also the
    // sleeper's second look after Bell::arm().
    if (slot.turn.load(std::memory_order_seq_cst) != received_ + 1) return false;
    message = Message{payload(slot), bytes_in(slot), slot.tag};
    return true;
  }

  void release() override {
    // seq_cst: the slot's reads are done before the sender sees the credit in try_acquire(), and
    // comes before ring()'s load.
    credits().released.store(++received_, std::memory_order_seq_cst);
    advance();
    sender_.ring();
  }

 private:
  Bell& sender_;
  uint32_t received_;
};

/// A small record that one thread writes and any process reads at any time (a sequence lock).
/// Readers are rare (diagnostics); the writer pays a few plain stores.
template <class T>
class alignas(kLine) Published {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) % sizeof(uint64_t) == 0);
  static constexpr size_t kWords = sizeof(T) / sizeof(uint64_t);

 public:
  void write(const T& value) {
    uint64_t words[kWords];
    std::memcpy(words, &value, sizeof(T));
    const uint32_t version = version_.load(std::memory_order_relaxed);  // only this thread writes
    version_.store(version + 1, std::memory_order_relaxed);
    for (size_t i = 0; i < kWords; ++i) {
      // release: a reader that sees this word sees the odd version before it.
      words_[i].store(words[i], std::memory_order_release);
    }
    // release: pairs with the first load in read(); the words are complete.
    version_.store(version + 2, std::memory_order_release);
  }

  /// The record, or T() where none could be read whole: the writer died in the middle of one.
  T read() const {
    constexpr int kQuick = 100, kAttempts = 1000;
    uint64_t words[kWords];
    for (int attempt = 0; attempt < kAttempts; ++attempt) {
      if (attempt >= kQuick) usleep(100);  // the writer has lost its core
      const uint32_t before = version_.load(std::memory_order_acquire);  // pairs with write()'s end
      for (size_t i = 0; i < kWords; ++i) {
        // acquire: pairs with write()'s words, so that the version below is not older than they.
        words[i] = words_[i].load(std::memory_order_acquire);
      }
      const uint32_t after = version_.load(std::memory_order_relaxed);
      if (before == after && before % 2 == 0) {
        T value;
        std::memcpy(&value, words, sizeof(T));
        return value;
      }
    }
    return T();
  }

 private:
  std::atomic<uint32_t> version_{0};
  std::atomic<uint64_t> words_[kWords] = {};
};

/// What a rank has to say of a failure. Nobody else writes it, and it does not change once Failures
/// names it.
struct alignas(kLine) FailureText {
  static constexpr size_t kTextBytes = 16384 - kLine;

  uint32_t kind = 0;
  uint32_t text_bytes = 0;
  alignas(kLine) char text[kTextBytes] = {};

  void write(const Failure& failure) {
    kind = static_cast<uint32_t>(failure.kind);
    text_bytes = static_cast<uint32_t>(std::min(failure.message.size(), kTextBytes));
    std::memcpy(text, failure.message.data(), text_bytes);
  }
  /// Whatever the bytes are, the failure makes sense as one.
  Failure read() const {
    const size_t bytes = std::min<size_t>(text_bytes, kTextBytes);
    const bool known = kind <= static_cast<uint32_t>(ErrorKind::kInternal);
    return Failure{known ? static_cast<ErrorKind>(kind) : ErrorKind::kInternal,
                   printable(std::string_view(text, bytes), kTextBytes)};
  }
};

/// Whose failure was the first one.
struct alignas(kLine) FailureWord {
  std::atomic<uint32_t> first{0};  ///< 1 + its rank; 0: there is none
};

/// The first failure on any rank, for all ranks to read. A rank completes its own text before it
/// asks to be the first, so whenever it dies or stops, there is a whole text or none, and another
/// rank's can be the first one.
class Failures {
 public:
  Failures(FailureWord& word, FailureText* texts, int world)
      : word_(word), texts_(texts), world_(world) {}

  bool raised() const { return word_.first.load(std::memory_order_acquire) != 0; }

  /// One thread at a time for each rank.
  void raise(int rank, const Failure& failure) const {
    if (raised()) return;  // perhaps this rank's, which must not change
    texts_[rank].write(failure);
    uint32_t none = 0;
    const uint32_t own = static_cast<uint32_t>(rank) + 1;
    // release: pairs with read(); kind and text are complete.
    word_.first.compare_exchange_strong(none, own, std::memory_order_release);
  }

  std::optional<Failure> read() const {
    const uint32_t first = word_.first.load(std::memory_order_acquire);  // pairs with raise()
    if (first == 0) return std::nullopt;
    if (first > static_cast<uint32_t>(world_)) {
      return Failure{ErrorKind::kInternal, "something else wrote into the memory of the group"};
    }
    return texts_[first - 1].read();
  }

 private:
  FailureWord& word_;
  FailureText* texts_;
  int world_;
};

/// The name of a rank's host; ends in zeros unless it is full.
struct HostName {
  char letters[64] = {};
};

/// A rank's last operations: several, because a rank may be some operations ahead of one that finds
/// out that they disagree.
struct alignas(kLine) History {
  std::atomic<uint64_t> last{0};  ///< sequence of the newest record
  Published<OpRecord> records[kKeptOperations];

  void announce(const OpRecord& record) {
    records[record.sequence % kKeptOperations].write(record);
    // release: pairs with last_record(); the record is there.
    last.store(record.sequence, std::memory_order_release);
  }
  OpRecord last_record() const {
    return record_of(last.load(std::memory_order_acquire));  // pairs with announce()
  }
  OpRecord record_of(uint64_t sequence) const {
    const OpRecord record = records[sequence % kKeptOperations].read();
    return record.sequence == sequence ? record : OpRecord();
  }
};

/// What a rank shows of itself.
struct alignas(kLine) RankLine {
  // In this order, one after another; 0 is a rank that has not come.
  static constexpr uint32_t kAttached = 1;  ///< holds its lock; the others can reach it
  static constexpr uint32_t kReady = 2;     ///< needs nothing any more to start
  static constexpr uint32_t kClosed = 3;

  std::atomic<uint32_t> state{0};
  std::atomic<uint32_t> pid{0};
  std::atomic<uint64_t> process{0};  ///< a random number of the process, where pids may repeat
  std::atomic<uint64_t> probe{0};    ///< address of a word that holds `word`
  std::atomic<uint64_t> word{0};
  std::atomic<uint64_t> single_copy_bytes{0};  ///< what it asks for; the most of all ranks counts
  std::atomic<uint32_t> reaches{0};  ///< it may read the memory of all others; before kReady
  Published<HostName> host;          ///< written before kAttached
  History on_host, on_device;

  History& history(Place place) { return place == Place::kHost ? on_host : on_device; }
  const History& history(Place place) const { return place == Place::kHost ? on_host : on_device; }
};

}  // namespace dpcomm
