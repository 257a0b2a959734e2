// One-shot all-reduce by packets, for small messages: no slots, no flags, no fence. It is the
// schedule OneShotAllReduce, and gives its bits. A packet is 16 bytes that arrive together: 12 of
// data and the operation's epoch, which says that the data are there.
//
//   each warp, for each of its tiles (wire.cuh):
//     encode the own elements into shared memory, as a slice of their own
//     push the slice, cut into packets, to every peer's buffer [parity][own rank][packet]
//     by ascending rank: poll the packets of a peer, put their data into shared memory, add;
//                        the own slice at its place (so it counts as it was sent)
//     round, write the output
//
// Warps do not meet before the end. A rank enters operation e only after operation e - 1 is
// complete, for which every peer had to be through with operation e - 2: so two buffers, by parity
// of the epoch, are enough. All ranks hear from all in each operation, or this would not hold.
//
// Packet 0 of a buffer is the greeting: the operation's tag, from the last warp of CTA 0. Ranks
// whose tags differ run different operations, and leave. CTA c's packets follow from 1 + c *
// (packets of the largest part) on; a tile's begin at its number times the packets of a whole tile.
#pragma once

#include "cuda/kernel_args.h"
#include "cuda/platform.cuh"
#include "cuda/primitives.cuh"
#include "cuda/wait.cuh"
#include "schedule/one_shot.h"

namespace dpcomm::gpu {

/// What a warp keeps of slices: the own one and those of a batch of peers.
struct alignas(16) PacketRoom {
  static constexpr int kBatch = kSharedIsScarce ? 2 : 4;
  static constexpr uint32_t kBytes = 1056;  // of the largest slice of a tile, in whole packets
  unsigned char own[kBytes];
  unsigned char source[kBatch][kBytes];
};

/// What the block knows. In shared memory.
struct PacketBlock {
  Command command;
  RankState rank;
  char* buffers[kMaxDeviceRanks];  ///< of packets, by rank
  uint32_t epoch;
  uint32_t cta;
  uint64_t sequence;
  uint64_t first_packet;           ///< of the CTA
  bool left[kPacketThreads / 32];  ///< by warp: it saw the abort
  bool aborted;                    ///< at the start
  PacketRoom room[kPacketThreads / 32];
};

template <class Wire>
class PacketKernel {
 public:
  using Schedule = OneShotAllReduce;
  using Bytes = Primitives<Wire>;
  using Acc = typename Bytes::Acc;
  static constexpr uint32_t kVec = Bytes::kVec;
  static constexpr uint32_t kVectors = Bytes::kVectors;
  static constexpr uint32_t kTile = Bytes::kTile;
  static constexpr uint32_t kPackets =  // of a whole tile
      (Wire::slice_bytes(kTile) + kPacketDataBytes - 1) / kPacketDataBytes;
  static_assert(kPackets * kPacketDataBytes <= PacketRoom::kBytes);
  static_assert(kTile == packet_tile_elems(Wire::kFormat, Wire::Element::kBytes));

  DPCOMM_DEVICE PacketKernel(PacketBlock& block, const KernelArgs& args)
      : block_(block), args_(args) {}

  /// Thread 0, before all else.
  DPCOMM_DEVICE void begin() {
    load_struct(block_.rank, args_.ranks + block_y());
    const RankState& rank = block_.rank;
    // The operation before may have been left halfway: its epoch was not kept. Host memory is far
    // away: asked first, looked at last.
    const uint32_t abort = load_word_relaxed(rank.abort);
    block_.cta = block_x();
    block_.sequence = args_.sequence;
    const int cta = static_cast<int>(block_.cta);
    const Range part = cta_part(args_.count, args_.grain, args_.ctas, cta);
    const uint64_t largest = cta_part(args_.count, args_.grain, args_.ctas, 0).count;
    block_.first_packet = 1 + cta * ((largest + kTile - 1) / kTile) * kPackets;
    block_.epoch = load_one<uint32_t>(rank.packet_epoch + cta) + 1;
    Command& command = block_.command;
    const ReduceOp op = static_cast<ReduceOp>(args_.op);
    const char* input = static_cast<const char*>(args_.input[block_y()]);
    char* output = static_cast<char*>(args_.output[block_y()]);
    command.own = input + part.first * Wire::Element::kBytes;
    command.output = output + part.first * Wire::Element::kBytes;
    command.elems = static_cast<uint32_t>(part.count);
    command.op = combiner(op);
    command.premultiply = op == ReduceOp::kPremulSum;
    command.divisor = op == ReduceOp::kAvg ? rank.world : 0;
    command.factor = args_.factor;
    const uint64_t used =
        reinterpret_cast<uint64_t>(command.own) | reinterpret_cast<uint64_t>(command.output);
    command.aligned = used % 16 == 0;
    block_.aborted = abort != 0;
  }

  /// All threads, beside begin(): where the buffers are.
  DPCOMM_DEVICE void load_buffers() {
    const RankState* rank = args_.ranks + block_y();
    const uint32_t world = load_one<uint32_t>(&rank->world);
    const char* list = reinterpret_cast<const char*>(load_one<uint64_t>(&rank->packets));
    DPCOMM_NO_UNROLL
    for (uint32_t i = thread(); i < world; i += threads()) {
      block_.buffers[i] = reinterpret_cast<char*>(load_one<uint64_t>(list + i * sizeof(char*)));
    }
  }

  /// All threads: the warp's tiles. False: the operation is aborted, or the ranks disagree.
  DPCOMM_DEVICE bool run() {
    if (block_.aborted) return false;
    const bool greets = block_.cta == 0 && warp_in_block() == warps_in_block() - 1;
    if (greets && any_in_warp(!greet())) return false;
    const uint32_t elems = block_.command.elems;
    DPCOMM_NO_UNROLL
    for (uint32_t at = warp_in_block() * kTile; at < elems; at += warps_in_block() * kTile) {
      const bool whole = block_.command.aligned && at + kTile <= elems;
      if (!(whole ? run_tile<true>(at) : run_tile<false>(at))) return false;
    }
    return true;
  }

  /// Thread 0, after all else: the epoch of this CTA, and of those that the operation has not.
  DPCOMM_DEVICE void end() {
    for (uint32_t warp = 0; warp < warps_in_block(); ++warp) {
      if (block_.left[warp]) return;
    }
    const RankState& rank = block_.rank;
    const int cta = static_cast<int>(block_.cta);
    store_one(rank.packet_epoch + cta, block_.epoch);
    if (cta != 0) return;
    DPCOMM_NO_UNROLL
    for (int i = args_.ctas; i < rank.max_ctas; ++i) store_one(rank.packet_epoch + i, block_.epoch);
  }

 private:
  DPCOMM_DEVICE PacketRoom& room() const { return block_.room[warp_in_block()]; }

  /// Packets of the slice of the tile that starts with element `tile`.
  DPCOMM_DEVICE uint32_t packets_of(uint32_t tile) const {
    const uint32_t elems = existing(block_.command.elems, tile, kTile);
    return (Wire::slice_bytes(elems) + kPacketDataBytes - 1) / kPacketDataBytes;
  }

  /// Packet 0 from rank `source`, in the buffer of rank `owner`: its greeting.
  DPCOMM_DEVICE char* greeting_at(int owner, int source) const {
    const uint64_t buffer = uint64_t{block_.epoch % 2} * block_.rank.world + source;
    return block_.buffers[owner] + buffer * block_.rank.packet_capacity * sizeof(Vec16);
  }

  /// Tells all peers the own tag and hears theirs, a lane for each peer. False: leave.
  DPCOMM_DEVICE bool greet() {
    const int world = block_.rank.world;
    const int own = block_.rank.rank;
    DPCOMM_NO_UNROLL
    for (int peer = static_cast<int>(lane_in_warp()); peer < world; peer += 32) {
      if (peer != own) store_packet(greeting_at(peer, own), Vec16{{args_.tag, 0, 0, block_.epoch}});
    }
    DPCOMM_NO_UNROLL
    for (int peer = static_cast<int>(lane_in_warp()); peer < world; peer += 32) {
      if (peer != own && !hear(peer)) return false;
    }
    return true;
  }

  /// One thread: waits for the greeting of `peer`. False: leave.
  DPCOMM_DEVICE bool hear(int peer) {
    Patience patience(block_.rank, WaitKind::kPacket, 0, 0, 0, block_.epoch, block_.sequence);
    Vec16 greeting = load_packet(greeting_at(block_.rank.rank, peer));
    while (greeting.w[3] != block_.epoch) {
      if (!patience.go_on(peer, greeting.w[3])) return false;
      greeting = load_packet(greeting_at(block_.rank.rank, peer));
    }
    patience.done();
    if (greeting.w[0] == args_.tag) return true;
    patience.disagree(peer, greeting.w[0], args_.tag);
    return false;
  }

  /// The first of these from rank `source`, in the buffer of rank `owner`.
  DPCOMM_DEVICE char* packets_at(int owner, int source, uint32_t tile) const {
    const uint64_t packet = block_.first_packet + tile / kTile * uint64_t{kPackets};
    return greeting_at(owner, source) + packet * sizeof(Vec16);
  }

  template <bool kWhole>
  DPCOMM_DEVICE bool run_tile(uint32_t tile) {
    const Command& command = block_.command;
    Acc sum[kVectors][kVec];
    encode_own<kWhole>(tile, sum);
    warp_sync();  // the own slice is whole
    push(tile);
    Bytes::start(command.op, sum);
    DPCOMM_NO_UNROLL
    for (int next = 0; next < block_.rank.world;) {  // by ascending rank
      const int own = block_.rank.rank;
      unsigned char* slice = room().own;
      int slices = 1;
      if (next != own) {
        const int end = next < own ? own : block_.rank.world;
        slices = end - next < PacketRoom::kBatch ? end - next : PacketRoom::kBatch;
        slice = room().source[0];
        if (any_in_warp(!pull(next, slices, anew(tile)))) return false;
        warp_sync();  // the slices are whole
      }
      DPCOMM_NO_UNROLL
      for (int b = 0; b < slices; ++b) add(slice + b * PacketRoom::kBytes, sum);
      warp_sync();  // they are read
      next += slices;
    }
    if (command.divisor != 0) Bytes::divide(sum, command.divisor);
    Bytes::template store_output<kWhole>(command, anew(tile + lane_in_warp() * kVec), sum);
    return true;
  }

  static DPCOMM_DEVICE Vec16& vector_at(unsigned char* slice, uint32_t j) {
    return reinterpret_cast<Vec16*>(slice + Wire::header_bytes(kTile))[j * 32 + lane_in_warp()];
  }

  /// The lane's vectors of the own slice; `values` is room for them.
  template <bool kWhole>
  DPCOMM_DEVICE void encode_own(uint32_t tile, Acc (*values)[kVec]) {
    Bytes::template load_own<kWhole>(block_.command, tile + lane_in_warp() * kVec, values);
    const uint32_t byte = Bytes::byte_of(values);
    warp_sync();  // the slice of the tile before is read
    Vec16 encoded[kVectors];
    Bytes::encode(values, byte, encoded);
    DPCOMM_UNROLL
    for (uint32_t j = 0; j < kVectors; ++j) vector_at(room().own, j) = encoded[j];
    if constexpr (Bytes::kBlocked) {
      if (lane_in_warp() % Wire::kBlockLanes == 0) {
        room().own[lane_in_warp() / Wire::kBlockLanes] = static_cast<unsigned char>(byte);
      }
    }
  }

  DPCOMM_DEVICE void push(uint32_t tile) {
    const uint32_t packets = packets_of(tile);
    const uint32_t* words = reinterpret_cast<const uint32_t*>(room().own);
    const int world = block_.rank.world;
    const int own = block_.rank.rank;
    DPCOMM_NO_UNROLL
    for (int distance = 1; distance < world; ++distance) {
      const int peer = own + distance < world ? own + distance : own + distance - world;
      char* to = packets_at(peer, own, tile);
      DPCOMM_NO_UNROLL
      for (uint32_t p = lane_in_warp(); p < packets; p += 32) {
        const Vec16 packet{{words[3 * p], words[3 * p + 1], words[3 * p + 2], block_.epoch}};
        store_packet(to + p * sizeof(Vec16), packet);
      }
    }
  }

  /// The slices of `batch` ranks from `source` on. False: the operation is aborted.
  DPCOMM_DEVICE bool pull(int source, int batch, uint32_t tile) {
    DPCOMM_NO_UNROLL
    for (uint32_t p = lane_in_warp(); p < packets_of(tile); p += 32) {
      Vec16 packet[PacketRoom::kBatch];
      DPCOMM_UNROLL
      for (int b = 0; b < PacketRoom::kBatch; ++b) packet[b] = Vec16{{0, 0, 0, block_.epoch - 1}};
      ask(packet, source, batch, tile, p);
      if (!wait_for(packet, source, batch, tile, p)) return false;
      PacketRoom& taken = room();
      DPCOMM_UNROLL
      for (int b = 0; b < PacketRoom::kBatch; ++b) {
        uint32_t* words = reinterpret_cast<uint32_t*>(taken.source[b]) + 3 * p;
        DPCOMM_UNROLL
        for (int i = 0; i < 3; ++i) words[i] = packet[b].w[i];
      }
    }
    return true;
  }

  /// True if packet b is still to come.
  DPCOMM_DEVICE bool is_missing(const Vec16* packet, int b, int batch) const {
    return b < batch && packet[b].w[3] != block_.epoch;
  }

  /// Loads packet p of a tile of rank source + b into packet[b], for all b of those missing.
  DPCOMM_DEVICE void ask(Vec16* packet, int source, int batch, uint32_t tile, uint32_t p) {
    const char* place = packets_at(block_.rank.rank, source, anew(tile)) + p * sizeof(Vec16);
    const uint64_t stride = block_.rank.packet_capacity * sizeof(Vec16);  // from rank to rank
    DPCOMM_UNROLL
    for (int b = 0; b < PacketRoom::kBatch; ++b) {
      if (is_missing(packet, b, batch)) packet[b] = load_packet(place + b * stride);
    }
  }

  /// Polls until no packet is missing. False: the operation is aborted.
  DPCOMM_DEVICE bool wait_for(Vec16* packet, int source, int batch, uint32_t tile, uint32_t p) {
    Patience patience(block_.rank, WaitKind::kPacket, block_.cta, 0, tile / kTile, block_.epoch,
                      block_.sequence);
    for (;;) {
      int missing = batch;
      uint32_t seen = 0;
      DPCOMM_UNROLL
      for (int b = PacketRoom::kBatch - 1; b >= 0; --b) {
        if (!is_missing(packet, b, batch)) continue;
        missing = b;
        seen = packet[b].w[3];
      }
      if (missing == batch) break;
      if (!patience.go_on(source + missing, seen)) return false;
      ask(packet, source, batch, tile, p);
    }
    patience.done();
    return true;
  }

  DPCOMM_DEVICE void add(unsigned char* slice, Acc (*sum)[kVec]) {
    const uint32_t lane = lane_in_warp();
    uint32_t byte = 0;
    if constexpr (Bytes::kBlocked) byte = slice[lane / Wire::kBlockLanes];
    Vec16 encoded[kVectors];
    DPCOMM_UNROLL
    for (uint32_t j = 0; j < kVectors; ++j) encoded[j] = vector_at(slice, j);
    Acc x[kVectors][kVec];
    Bytes::decode(encoded, byte, x);
    Bytes::add(block_.command.op, sum, x);
  }

  PacketBlock& block_;
  const KernelArgs& args_;
};

/// The kernel: blocks of a multiple of 32 threads, at most kPacketThreads; one block for each CTA.
/// An operation has at least one element.
/// Cost: one way over the link; (world - 1) slices of the part leave this rank, 16 bytes for 12;
/// the input is read once and the output written once.
template <class Wire>
DPCOMM_DEVICE void run_packets(const KernelArgs& args) {
  DPCOMM_SHARED(PacketBlock, block);
  PacketKernel<Wire> kernel(block, args);
  if (thread() == 0) kernel.begin();
  kernel.load_buffers();
  block_sync();
  const bool left = !kernel.run();
  if (lane_in_warp() == 0) block.left[warp_in_block()] = left;
  block_sync();
  if (thread() == 0) kernel.end();
}

}  // namespace dpcomm::gpu
