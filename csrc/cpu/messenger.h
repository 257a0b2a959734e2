// Messages between two ranks: the protocol, as one rank sees it.
//
// An ordered pair of ranks has one channel (Port::kMessages), which carries packets of all messages
// of the pair, and of the answers to those of the other direction:
//
//   announce  to the receiver   a message: id, tag, bytes. A short one comes along.
//   answer    to the sender     a receive has met it. "taken": it had come along, and is where it
//                               belongs; "clear": its bytes may follow.
//   data      to the receiver   the next bytes of a message that is clear
//
// The receiver alone decides which receive meets which message: the first one in the order of
// receives that has the tag and admits the sender. Announcements keep the order of sends. So every
// message is promised once, and two of a pair with one tag never overtake each other.
//
// Why nothing gets stuck: a packet that has come is taken at once, and needs nothing for it. An
// announcement is noted, an answer is noted, data goes to the buffer of a receive. So every channel
// drains while the messenger of its receiver is driven, every packet that wants to leave gets its
// slot, and each message has three packets' ways to go, none of which waits for another message.
//
// What it holds besides the transfers of its own user: for each message that peers have announced
// and nobody receives yet a note, and of each peer at most kKeptBytes of short messages. What comes
// along beyond that is dropped, and sent once more when it is clear.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <list>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "base/clock.h"
#include "cpu/diagnosis.h"
#include "transport/channel.h"

namespace dpcomm {

/// A send or a receive on its way.
struct Transfer {
  static constexpr int kAnyPeer = -1;

  virtual ~Transfer() = default;

  bool sends = false;
  int peer = 0;  ///< of a receive also kAnyPeer
  uint32_t tag = 0;
  std::byte* data = nullptr;  ///< of a send only read
  size_t bytes = 0;
  Clock::time_point deadline;
  std::chrono::milliseconds limit{0};  ///< what the deadline came from, for messages

  int source = -1;   ///< of a receive: whose message it has met
  size_t moved = 0;  ///< bytes that have left or come

 private:
  friend class Messenger;
  uint32_t id_ = 0;  // of the message, among its sender's to the receiver
  std::list<std::shared_ptr<Transfer>>::iterator place_;  // among those that are open
};

/// One thread at a time.
class Messenger {
 public:
  explicit Messenger(Transport& transport);

  /// Begins a transfer. Throws UsageError if it meets a message of another size.
  void post(std::shared_ptr<Transfer> transfer);
  /// Takes what has come and sends what can leave; true if there was anything. Throws UsageError
  /// where a message and its receive differ in size, InternalError for a damaged packet.
  bool progress();
  /// To be asked when a wait lasts: throws PeerError where a rank has gone that is needed, or
  /// TimeoutError.
  void check();
  /// Of a rank that has died, where anything is on its way; nothing, if all live.
  std::optional<Failure> death() const;

  /// Transfers that are complete, for the user to take.
  std::deque<std::shared_ptr<Transfer>>& finished() { return finished_; }
  /// Those that are not, given up.
  std::list<std::shared_ptr<Transfer>> abandon();
  bool idle() const { return open_.empty(); }
  /// Whether bytes are on their way, so that the next packet is a matter of microseconds.
  bool streams() const { return streaming_ > 0; }
  /// "send of 400 bytes to rank 1 (pid 4711), tag 7".
  std::string describe(const Transfer& transfer) const;
  uint64_t wire_bytes() const { return wire_bytes_; }

  static constexpr size_t kShortBytes = size_t{8} << 10;   ///< that come along
  static constexpr size_t kKeptBytes = size_t{256} << 10;  ///< of a peer's short messages

 private:
  using Ref = std::shared_ptr<Transfer>;
  enum class Kind : uint32_t { kAnnounce = 1, kAnswer, kData };

  /// The beginning of every slot.
  struct Packet {
    Kind kind;
    uint32_t id;
    uint32_t tag;
    uint32_t comes_along;
    uint64_t bytes;   ///< of the whole message; in an answer unused
    uint64_t offset;  ///< of the data in its message
    uint64_t reserved[4];
  };
  static_assert(sizeof(Packet) == 64);
  /// An answer's payload is an array of these.
  struct Answer {
    uint32_t id;
    uint32_t clear;
  };
  struct PendingAnswer {
    Answer answer;
    Ref taken_by;  // complete when the answer has left: then its sender is, too
  };
  /// A message that nobody receives yet.
  struct Announced {
    int source;
    uint32_t id;
    size_t bytes;
    bool kept;
    std::vector<std::byte> payload;
  };
  struct Peer {
    SendChannel* out = nullptr;
    RecvChannel* in = nullptr;
    uint32_t packets_sent = 0, packets_come = 0;
    uint32_t next_id = 0;                          // of messages to this peer
    std::deque<PendingAnswer> answers;             // to leave
    std::deque<Ref> announcements;                 // to leave
    std::unordered_map<uint32_t, Ref> unanswered;  // sends, by id
    std::deque<Ref> clear;                         // sends whose data leaves
    std::unordered_map<uint32_t, Ref> coming;      // receives whose data comes, by id
    size_t kept_bytes = 0;
    bool data_next = false;  // whose turn it is, announcements' or data's
    int gone = 0;            // how often check() has seen it so
    // For the texts of errors.
    uint64_t announced = 0;  // messages that it has announced
    uint32_t last_tag = 0;
    uint64_t last_bytes = 0;
  };

  bool receive(int peer);
  void take(int peer, const Message& message);
  void take_announcement(int peer, const Packet& packet, const std::byte* payload, size_t bytes);
  void take_answers(int peer, const std::byte* payload, size_t bytes);
  void take_data(int peer, const Packet& packet, const std::byte* payload, size_t bytes);
  void meet(const Ref& receive, int source, uint32_t id, size_t bytes, bool here,
            const std::byte* payload);

  bool transmit(int peer, bool also_data);
  void send_answers(Peer& peer, std::byte* slot);
  void send_announcement(Peer& peer, std::byte* slot);
  void send_data(Peer& peer, std::byte* slot);
  void publish(Peer& peer, std::byte* slot, const Packet& packet, size_t payload_bytes);

  void finish(const Ref& transfer);
  void check_gone();
  [[noreturn]] void throw_gone(int rank, const char* how, const Transfer& transfer) const;
  [[noreturn]] void throw_timeout(const Transfer& transfer) const;
  [[noreturn]] void throw_damaged(int peer, const char* what) const;
  std::string reason(const Transfer& transfer) const;
  std::string last_news(int peer) const;
  std::string unexpected() const;

  Transport& transport_;
  const Diagnosis diagnosis_;
  const int rank_;
  const int slots_;
  const size_t payload_bytes_;  // of a packet
  std::vector<Peer> peers_;     // by rank; the own one is empty
  std::list<Ref> open_;         // all that is not complete, in the order in which it was posted
  std::deque<Ref> finished_;
  std::unordered_map<uint32_t, std::list<Ref>> receives_;         // without a message, by tag
  std::unordered_map<uint32_t, std::list<Announced>> announced_;  // without a receive, by tag
  int streaming_ = 0;
  uint64_t wire_bytes_ = 0;
};

}  // namespace dpcomm
