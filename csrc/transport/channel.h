// THE neck: all that an algorithm may know of how bytes get from one rank to another.
//
// A channel is a one-way path from a rank to a rank with a bounded number of slots. The sender
// acquires a free slot, fills it and publishes; the receiver peeks at the oldest published message
// and releases it. Nothing here blocks: calls named try_ answer at once, and a rank that has
// nothing to do arms its bell, looks once more and sleeps. One thread at a time uses a port of a
// transport, its channels and its bell; wake(), fail(), failure() and what reads records and states
// of peers any thread may call. Records are announced by one thread at a time for each place.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "base/error.h"

namespace dpcomm {

/// What a slot carries: bytes, and a tag by which both ends see that they run the same operation.
struct Message {
  const std::byte* data = nullptr;
  uint32_t bytes = 0;
  uint32_t tag = 0;
};

class SendChannel {
 public:
  virtual ~SendChannel() = default;
  /// A free slot to fill (64-byte aligned, slot_bytes long), or nullptr. Until publish() the same
  /// slot is returned again; a slot that is never published is not seen by anybody.
  virtual std::byte* try_acquire() = 0;
  /// Hands the slot acquired last, with `bytes` of payload, to the receiver.
  virtual void publish(uint32_t bytes, uint32_t tag) = 0;
};

class RecvChannel {
 public:
  virtual ~RecvChannel() = default;
  /// The oldest message not yet released, or nothing. Its bytes stay valid until release().
  virtual bool try_peek(Message& message) = 0;
  /// Gives the slot of the message peeked last back to the sender.
  virtual void release() = 0;
};

/// Number and size of the slots of a lane's channels; the same on all ranks.
struct LaneGeometry {
  int slots = 0;
  size_t slot_bytes = 0;
};

/// Two threads of a rank may use its channels at once, each through a port with a bell of its own:
/// one runs collectives, on the lanes of schedules, one moves messages between two ranks, on a lane
/// behind those.
enum class Port : uint8_t { kCollectives, kMessages };

/// A rank's operations on the CPU and those on its device are two orders, each with numbers of its
/// own.
enum class Place : uint8_t { kHost, kDevice };

/// How far a device is with the last operation that it was given.
enum class Stage : uint8_t {
  kUnknown,
  kBehind,  ///< it waits for what the caller's stream does before
  kRunning,
  kLeft,  ///< the device touches no peer's memory any more, nor lets a peer touch its own
};

/// What a rank says of itself before it starts an operation, for diagnostics.
struct OpRecord {
  uint64_t sequence = 0;  ///< number of the operation in its communicator, from 1
  uint64_t finished = 0;  ///< number of the last operation that this rank finished
  int64_t alive_ns = 0;   ///< now_ns() when this rank last showed that it runs
  uint64_t count = 0;     ///< elements; in blocks of unequal size, all of them
  double factor = 0;      ///< of PREMUL_SUM
  int32_t root = 0;
  uint8_t collective = 0;  ///< Collective
  uint8_t dtype = 0;       ///< Dtype
  uint8_t op = 0;          ///< ReduceOp
  uint8_t wire = 0;        ///< WireFormat
  uint8_t algorithm = 0;   ///< index into kAlgorithms
  uint8_t stage = 0;       ///< Stage; of operations on a device
  uint8_t path = 0;        ///< Path (cpu/local_paths.h)
  uint8_t reserved = 0;    ///< no padding: the record is hashed as words
  uint32_t blocks = 0;     ///< digest of the sizes of blocks; 0: of equal size, or known to few
};

static_assert(sizeof(OpRecord) == 56);

/// Operations of a rank that announced_at() knows, counted back from its last one.
inline constexpr uint64_t kKeptOperations = 16;

enum class PeerState { kAlive, kClosed, kDead };

/// Why a communicator can no longer be used; the first rank to fail writes it for all.
struct Failure {
  ErrorKind kind = ErrorKind::kInternal;
  std::string message;
};

class Board;

/// How this rank can get at the memory of the others' processes.
enum class Reach : uint8_t {
  kNone,
  kCopies,  ///< every rank may read every rank's memory (process_memory.h)
};

class Transport {
 public:
  virtual ~Transport() = default;

  virtual int rank() const = 0;
  virtual int world() const = 0;
  virtual LaneGeometry geometry(int lane) const = 0;
  /// The lane of Port::kMessages.
  virtual int message_lane() const = 0;
  virtual SendChannel& send_channel(int peer, int lane) = 0;
  virtual RecvChannel& recv_channel(int peer, int lane) = 0;

  /// Where the ranks meet for the paths that do without channels; null if they share no memory.
  virtual Board* board() { return nullptr; }
  /// The same on all ranks.
  virtual Reach reach() const { return Reach::kNone; }
  /// Size from which an all-reduce reads the others' memory (reach()) rather than have it copied;
  /// the same on all ranks.
  virtual size_t single_copy_bytes() const { return SIZE_MAX; }
  /// The process of a rank of this host.
  virtual uint32_t process_id(int /*rank*/) const { return 0; }

  // Waiting. arm(); look at the channels once more; then sleep(ticket) or disarm().
  virtual uint32_t arm(Port port) = 0;
  virtual void disarm(Port port) = 0;
  /// Returns after a message or credit for this rank's port since arm(), a wake(), or `limit`.
  virtual void sleep(Port port, uint32_t ticket, std::chrono::nanoseconds limit) = 0;
  /// Ends a sleep at this rank's port, from any thread.
  virtual void wake(Port port) = 0;

  // Diagnostics.
  virtual void announce(const OpRecord& record, Place place = Place::kHost) = 0;
  /// The last record of a rank; OpRecord() before the first one.
  virtual OpRecord announced(int rank, Place place = Place::kHost) const = 0;
  /// The last record of a rank's operation `sequence`; OpRecord() if it is not (or no longer)
  /// known.
  virtual OpRecord announced_at(int rank, uint64_t sequence, Place place = Place::kHost) const {
    const OpRecord last = announced(rank, place);
    return last.sequence == sequence ? last : OpRecord();
  }
  virtual PeerState peer_state(int rank) const = 0;
  /// "rank 1 (pid 4711, host node1)".
  virtual std::string describe(int rank) const = 0;
  /// Makes the communicator unusable on every rank and wakes all. The first call on any rank wins;
  /// later ones change nothing.
  virtual void fail(const Failure& failure) = 0;
  /// The failure, or nothing. Cheap enough to ask in every turn of a wait.
  virtual std::optional<Failure> failure() const = 0;
  virtual bool failed() const = 0;
  /// Tells the peers that this rank leaves. Messages already published stay readable.
  virtual void close() = 0;
};

}  // namespace dpcomm
