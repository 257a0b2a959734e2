// Where the ranks of one host meet without channels: the CPU's paths for whole tensors
// (cpu/local_paths.h) announce their part of an operation here and wait for each other.
//
//   of each rank:  arrival of odd and of even operations | counters | slots | bounce buffers
//
// Every word has one writer, the rank whose it is. An operation on the board has a number, its
// epoch, the same on all ranks. A rank arrives by filling the line of the epoch's parity and
// storing the epoch; afterwards all go through the same stages, each a counter that only grows.
// Every operation waits for the arrival of all ranks, so no rank is more than one epoch ahead of
// another, and two lines (and two slots) suffice: whoever fills the line of epoch e + 2 has seen
// everybody's arrival in e + 1, and whoever has arrived there is through with e.
//
// All orders are seq_cst: a store makes what was written before it visible to whoever sees it, and
// store, then look at a sleeper's flag, pairs with a sleeper's flag, then look at the store
// (slot_ring.h, Bell).
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>

#include "transport/slot_ring.h"

namespace dpcomm {

/// How the others get at what a rank contributes.
enum class Where : uint32_t {
  kInline,   ///< it is in the arrival itself
  kSlot,     ///< in the rank's slot of the epoch's parity
  kPrivate,  ///< at an address of the rank's process
  kHeap,     ///< in the rank's shared heap (cpu/shared_heap.h)
};

/// Input and output of a rank in an operation. Comes from memory that others write to.
struct Location {
  uint64_t input = 0;    ///< address in the rank's process
  uint64_t output = 0;   ///< likewise
  uint64_t heap_id = 0;  ///< of the shared heap that both lie in; 0: of none
  uint64_t heap_bytes = 0;
  uint64_t heap_base = 0;  ///< its address in the rank's process
  int32_t heap_fd = -1;
  uint32_t reserved = 0;
};

inline constexpr size_t kInlineBytes = 48;
static_assert(sizeof(Location) <= kInlineBytes);

/// Two lines, here and below: processors fetch lines in pairs.
inline constexpr size_t kPair = 2 * kLine;

struct alignas(kPair) Arrival {
  std::atomic<uint64_t> epoch{0};
  uint32_t tag = 0;  ///< fingerprint of the operation
  Where where = Where::kInline;
  std::byte data[kInlineBytes] = {};
};
static_assert(sizeof(Arrival) == kPair);

struct alignas(kPair) BoardCounter {
  std::atomic<uint64_t> value{0};
};

/// Sizes of what each rank has on a board; the same on all ranks.
struct BoardLayout {
  int world = 0;
  size_t slot_bytes = 0;    ///< of each of the two slots
  size_t bounce_bytes = 0;  ///< of each of the kBounceBuffers

  static constexpr int kCounters = 3;
  static constexpr int kBounceBuffers = 3;
  static constexpr size_t kPage = 4096;  ///< slots and buffers begin at one
  static constexpr size_t to_page(size_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }
  size_t counters_offset() const { return 2 * sizeof(Arrival); }
  size_t slots_offset() const {
    return to_page(counters_offset() + kCounters * sizeof(BoardCounter));
  }
  size_t bounce_offset() const { return to_page(slots_offset() + 2 * slot_bytes); }
  size_t rank_bytes() const { return to_page(bounce_offset() + kBounceBuffers * bounce_bytes); }
  size_t bytes() const { return world * rank_bytes(); }
};

/// What a planted fault does to something that is about to be published (transport/faulty.h).
enum class PublishFault { kNone, kDropped, kRetagged };

class Board {
 public:
  /// `bells`: of each rank, those that its operations sleep at, `stride` apart. Zero memory is a
  /// board that nobody has used.
  Board(std::byte* base, const BoardLayout& layout, int rank, Bell* bells, size_t stride)
      : base_(base), layout_(layout), rank_(rank), bells_(bells), stride_(stride) {}

  const BoardLayout& layout() const { return layout_; }
  int world() const { return layout_.world; }

  /// A rank's line of an epoch; complete once has_arrived() says so.
  Arrival& arrival(int rank, uint64_t epoch) const {
    return *reinterpret_cast<Arrival*>(of(rank) + (epoch & 1) * sizeof(Arrival));
  }
  bool has_arrived(int rank, uint64_t epoch) const {
    return arrival(rank, epoch).epoch.load() == epoch;  // seq_cst: pairs with arrive()
  }
  /// Publishes this rank's line of the epoch, which is filled but for the epoch.
  void arrive(uint64_t epoch) {
    Arrival& own = arrival(rank_, epoch);
    if (fault_) {
      const PublishFault fault = fault_();
      if (fault == PublishFault::kDropped) return;
      if (fault == PublishFault::kRetagged) own.tag ^= 1;
    }
    own.epoch.store(epoch);  // seq_cst: makes the line and the slot visible to has_arrived()
    ring();
  }

  /// Adds one to a counter of this rank.
  void count(int counter) {
    if (fault_ && fault_() == PublishFault::kDropped) return;
    std::atomic<uint64_t>& value = counter_of(rank_, counter);
    value.store(value.load() + 1);  // seq_cst: makes what was done before visible to counted()
    ring();
  }
  uint64_t counted(int rank, int counter) const {
    return counter_of(rank, counter).load();  // seq_cst: pairs with count()
  }

  std::byte* slot(int rank, uint64_t epoch) const {
    return of(rank) + layout_.slots_offset() + (epoch & 1) * layout_.slot_bytes;
  }
  std::byte* bounce(int rank, uint64_t chunk) const {
    return of(rank) + layout_.bounce_offset() +
           chunk % BoardLayout::kBounceBuffers * layout_.bounce_bytes;
  }

  /// Asked before anything is published; for tests.
  void plant(std::function<PublishFault()> fault) { fault_ = std::move(fault); }

 private:
  std::byte* of(int rank) const { return base_ + rank * layout_.rank_bytes(); }
  std::atomic<uint64_t>& counter_of(int rank, int counter) const {
    return reinterpret_cast<BoardCounter*>(of(rank) + layout_.counters_offset())[counter].value;
  }
  void ring() const {
    for (int rank = 0; rank < layout_.world; ++rank) {
      if (rank != rank_) reinterpret_cast<Bell*>(at(rank))->ring();
    }
  }
  std::byte* at(int rank) const { return reinterpret_cast<std::byte*>(bells_) + rank * stride_; }

  std::byte* base_;
  BoardLayout layout_;
  int rank_;
  Bell* bells_;
  size_t stride_;
  std::function<PublishFault()> fault_;
};

}  // namespace dpcomm
