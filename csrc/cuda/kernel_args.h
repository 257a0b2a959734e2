// What the host hands to a kernel: plain structs that host compilers and nvcc lay out alike.
//
// Staging is memory of a rank's device that its peers write: the slots of the channels on which the
// rank receives, and flags. Everything is pushed; nobody reads a peer's memory over the link.
//
//   sender's staging                                  receiver's staging
//   credit  <------------ released ------------------  (receiver's count)
//   (sender's count)  --- payload, then arrival ---->  slot 0 .. slots-1, arrival 0 .. slots-1
//
// A message m = 1, 2, ... of a channel goes through slot (m - 1) % slots. Each flag has a line of
// its own and one writer. Counts outlive a kernel (they lie in the rank's device memory), so a
// captured graph can be replayed and sizes may vary from call to call.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/macros.h"
#include "schedule/collective.h"
#include "wire/wire_format.h"

namespace dpcomm {

inline constexpr int kFlagLineBytes = 128;     ///< a flag has a line of its own
inline constexpr int kMaxDeviceRanks = 64;     ///< of a communicator on devices
inline constexpr int kMaxVirtualRanks = 16;    ///< in one launch (gridDim.y)
inline constexpr int kMaxThreads = 512;        ///< of a block; a multiple of 32
inline constexpr int kPacketDataBytes = 12;    ///< of the 16 bytes of a packet; then its epoch
inline constexpr int kPacketThreads = 256;     ///< of a block of a packet kernel, at most
inline constexpr int kPacketTileBytes = 1024;  ///< of payload that a warp sends as packets at once
inline constexpr int kLookEvery = 256;         ///< polls between two looks at the abort word
inline constexpr int kRecordAfter = 1 << 12;   ///< polls after which a wait is recorded

/// Both ends of the channels between a rank and one peer in one lane of one CTA. Null where the two
/// have no channel. Pointers are as the owner of the table sees them.
struct ChannelEnds {
  // peer -> rank
  char* recv_slots;         ///< in the rank's staging
  const uint64_t* arrival;  ///< the rank's; one line for each slot; written by the peer
  uint64_t* peer_credit;    ///< in the peer's staging: messages that the rank has released
  // rank -> peer
  char* send_slots;        ///< in the peer's staging
  uint64_t* peer_arrival;  ///< in the peer's staging
  const uint64_t* credit;  ///< the rank's; written by the peer
};

/// Messages that a rank has received from and sent to a peer over one channel, since the start.
struct ChannelCounts {
  uint64_t received;
  uint64_t sent;
};

/// The value of an arrival flag: the low half of the message's number, and the operation's tag.
/// A tag that differs from the receiver's own says that the ranks run different operations.
DPCOMM_HD constexpr uint64_t arrival_value(uint64_t message, uint32_t tag) {
  return (uint64_t{tag} << 32) | static_cast<uint32_t>(message);
}

/// Why a block waits, in host memory that the device writes: for the text of an error. Written word
/// by word, `state` last; the reader takes it for a hint.
enum class WaitKind : uint32_t { kNone, kArrival, kCredit, kPacket, kDisagree };
struct WaitRecord {
  uint32_t state;  ///< WaitKind
  uint32_t rank;
  uint32_t cta;
  uint32_t lane;  ///< of the schedule
  uint32_t step;  ///< of the lane, from 0, over all rounds
  uint32_t peer;
  uint32_t seen;      ///< the flag's low half (kDisagree: the tag that came)
  uint32_t wanted;    ///< (kDisagree: the own tag)
  uint64_t sequence;  ///< of the operation
};

/// What the kernels of one rank use again and again: an array of these lies in device memory.
struct RankState {
  int32_t rank;
  int32_t world;
  int32_t slots;
  int32_t channel_lanes;  ///< lanes of the table
  uint64_t slot_bytes;
  const ChannelEnds* ends;  ///< [cta][channel lane][peer]
  ChannelCounts* counts;    ///< the same indexes; the rank's own, nobody else looks
  // One-shot packets: [parity][source rank][packet], each rank's own buffer, written by the peers.
  char* const* packets;      ///< buffer of each rank, by rank
  uint64_t packet_capacity;  ///< packets from one source with one parity
  // The rank's own: operations by packets so far, one count for each CTA that it may have, all
  // equal. Block c of an operation counts up its own, the block of CTA 0 also those of CTAs that
  // the operation has not: a place in the buffer may belong to another CTA the next time, and a
  // stale packet there must not show the epoch that is due.
  uint32_t* packet_epoch;
  int32_t max_ctas;
  // Host memory; not 0: leave, publish nothing more. Written by the host, and by a block that finds
  // that the ranks disagree. Each block looks at its start, too: after an operation that was left
  // the counts are not what the peers have seen.
  uint32_t* abort;
  WaitRecord* waits;      ///< host memory; [cta][lane of the schedule]
  uint32_t look_every;    ///< kLookEvery, fewer in emulation
  uint32_t record_after;  ///< kRecordAfter, fewer in emulation
};

/// Lanes that the table of wait records has for each CTA.
inline constexpr int kMaxScheduleLanes = 4;

/// One operation. The grid is (ctas * lanes of the schedule, ranks in this launch); block x works
/// on lane x % lanes of CTA x / lanes. CTA c takes the c-th part of the tensor (cta_part) and runs
/// the whole schedule on it, over channels of its own.
struct KernelArgs {
  const RankState* ranks;  ///< device memory; one for each blockIdx.y
  uint64_t count;          ///< elements of the tensor, or of a block (is_blocked)
  uint64_t sequence;
  uint64_t slot_elems;  ///< of the largest slice (Cut)
  uint64_t grain;       ///< elements
  double factor;        ///< of PREMUL_SUM
  uint32_t tag;         ///< of the operation, not 0
  int32_t root;
  int32_t slices;      ///< per chunk
  uint8_t collective;  ///< Collective
  uint8_t algorithm;   ///< index into kAlgorithms
  uint8_t op;          ///< ReduceOp
  uint8_t ctas;
  const void* input[kMaxVirtualRanks];  ///< by blockIdx.y
  void* output[kMaxVirtualRanks];
};

/// Elements that a warp sends as packets at once: kPacketTileBytes of payload, but int8 has one
/// block-scaled tile of 512.
DPCOMM_HD constexpr uint64_t packet_tile_elems(WireFormat wire, size_t elem_bytes) {
  return wire == WireFormat::kNative ? kPacketTileBytes / elem_bytes : 512;
}

/// The part of `count` elements (of each block, where is_blocked) that CTA `cta` of `ctas` works
/// on.
DPCOMM_HD inline Range cta_part(uint64_t count, uint64_t grain, int ctas, int cta) {
  const uint64_t each = ((count + ctas - 1) / ctas + grain - 1) / grain * grain;
  const uint64_t first = each * cta < count ? each * cta : count;
  return Range{first, count - first < each ? count - first : each};
}

}  // namespace dpcomm
