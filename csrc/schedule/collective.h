// Collectives, and how the elements of a tensor fall into rounds, chunks and slices.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/macros.h"

namespace dpcomm {

enum class Collective : uint8_t {
  kAllReduce,
  kBroadcast,
  kReduce,
  kAllGather,      ///< count = elements that each rank contributes
  kReduceScatter,  ///< count = elements that each rank receives
  kBarrier,
  kGather,    ///< count = elements that each rank contributes; the root gets them in rank order
  kScatter,   ///< count = elements that each rank receives; the root has them in rank order
  kAllToAll,  ///< count = elements that each rank sends to each rank
};
inline constexpr int kCollectives = 9;

constexpr const char* name(Collective collective) {
  constexpr const char* kNames[kCollectives] = {"all_reduce", "broadcast",      "reduce",
                                                "all_gather", "reduce_scatter", "barrier",
                                                "gather",     "scatter",        "all_to_all"};
  return kNames[static_cast<int>(collective)];
}

DPCOMM_HD constexpr bool reduces(Collective collective) {
  return collective == Collective::kAllReduce || collective == Collective::kReduce ||
         collective == Collective::kReduceScatter;
}

/// True where chunk c of a round lies in rank c's block of a tensor of world_size blocks
/// (all-gather's output, reduce-scatter's input); false where chunks divide the tensor itself.
DPCOMM_HD constexpr bool is_blocked(Collective collective) {
  return collective == Collective::kAllGather || collective == Collective::kReduceScatter;
}

/// True for what runs on the CPU only (schedule/host_algorithms.def).
constexpr bool is_host_only(Collective collective) { return collective > Collective::kBarrier; }

/// As is_blocked(), which knows the collectives of the kernels, for all of them.
constexpr bool has_blocks(Collective collective) {
  return is_blocked(collective) || is_host_only(collective);
}

/// True where one rank is the root.
constexpr bool is_rooted(Collective collective) {
  return collective == Collective::kBroadcast || collective == Collective::kReduce ||
         collective == Collective::kGather || collective == Collective::kScatter;
}

/// True where `rank` has an input (an output) if the root is `root`.
constexpr bool has_input(Collective collective, int rank, int root) {
  const bool from_root = collective == Collective::kBroadcast || collective == Collective::kScatter;
  return !from_root || rank == root;
}
constexpr bool has_output(Collective collective, int rank, int root) {
  const bool to_root = collective == Collective::kReduce || collective == Collective::kGather;
  return !to_root || rank == root;
}

/// A range of elements.
struct Range {
  size_t first = 0;
  size_t count = 0;
};

/// How `count` elements fall into rounds, chunks and slices. A function of its arguments alone
/// (law 5): never of an address or a number of threads. Every slice fits a slot, and every edge but
/// the end of the tensor (or block) is a multiple of `grain` elements, itself a multiple of the
/// wire format's block.
///
/// Flat (all-reduce, broadcast, reduce): round r covers the next chunks * slices * slot_elems
/// elements; a short last round is divided evenly. Blocked: round r covers the next slices *
/// slot_elems elements of every rank's block.
class Partition {
 public:
  /// `slot_elems` is a positive multiple of `grain`.
  DPCOMM_HD Partition(size_t count, int chunks, int slices, size_t slot_elems, size_t grain,
                      bool blocked)
      : count_(count),
        chunks_(blocked ? 1 : chunks),
        slices_(slices),
        slot_elems_(slot_elems),
        grain_(grain),
        blocked_(blocked) {}

  DPCOMM_HD size_t rounds() const {
    const size_t per_round = round_elems();
    return count_ == 0 ? 0 : (count_ + per_round - 1) / per_round;
  }

  /// Elements of slice `slice` of chunk `chunk` in `round`, counted from the start of the tensor
  /// (flat) or of the chunk's block (blocked). May be empty.
  DPCOMM_HD Range slice(size_t round, int chunk, int slice) const {
    return this->slice(this->round(round), chunk, slice);
  }

  /// What all slices of a round share: the divisions are done here.
  struct Round {
    size_t base = 0;  ///< its first element
    size_t left = 0;  ///< elements from there on, at most those of a round
    size_t per_chunk = 0;
    size_t per_slice = 0;
  };
  DPCOMM_HD Round round(size_t index) const {
    Round round;
    round.base = index * round_elems();
    round.left = count_ - round.base < round_elems() ? count_ - round.base : round_elems();
    round.per_chunk = divide_up(round.left, chunks_);
    round.per_slice = divide_up(round.per_chunk, slices_);
    return round;
  }
  DPCOMM_HD Range slice(const Round& round, int chunk, int slice) const {
    const Range in_round = part(round.left, round.per_chunk, blocked_ ? 0 : chunk);
    const Range in_chunk = part(in_round.count, round.per_slice, slice);
    return Range{round.base + in_round.first + in_chunk.first, in_chunk.count};
  }

  DPCOMM_HD size_t slot_elems() const { return slot_elems_; }

 private:
  DPCOMM_HD size_t round_elems() const { return size_t(chunks_) * slices_ * slot_elems_; }

  /// ceil(elems / parts), rounded up to the grain.
  DPCOMM_HD size_t divide_up(size_t elems, int parts) const {
    const size_t each = (elems + parts - 1) / parts;
    return (each + grain_ - 1) / grain_ * grain_;
  }

  DPCOMM_HD static Range part(size_t elems, size_t each, int index) {
    const size_t first = each * index < elems ? each * index : elems;
    return Range{first, elems - first < each ? elems - first : each};
  }

  size_t count_;
  int chunks_;
  int slices_;
  size_t slot_elems_;
  size_t grain_;
  bool blocked_;
};

}  // namespace dpcomm
