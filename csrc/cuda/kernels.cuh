// The kernel that runs a schedule: one block is one lane of one CTA. How a step goes:
//
//   warp 0, lane 0    takes the next step from the generator, and where its slice lies
//   warp 0            lane i takes the i-th peer: which slot, what to publish; polls its flag
//   --- barrier ---   the command is written, the slots are readable and writable
//   all threads       move the bytes (primitives.cuh)
//   --- barrier ---   all bytes are moved
//   thread 0          one fence, then arrival flags to the receivers, credits to the senders
//
// The schedule is chosen at run time (its generator lies in shared memory and is asked by one
// thread), element and wire format at compile time: docs/adr/0004. Counts of messages are taken
// over at the start and written back at the end; a block that leaves because of an abort, or
// because the ranks disagree, publishes and writes back nothing more.
#pragma once

#include <new>
#include <type_traits>

#include "cuda/kernel_args.h"
#include "cuda/platform.cuh"
#include "cuda/primitives.cuh"
#include "cuda/wait.cuh"
#include "schedule/algorithms.h"
#include "schedule/collective.h"
#include "schedule/step.h"

namespace dpcomm::gpu {

/// Memory for an object of a class that has a constructor, which shared variables must not have.
template <class T>
struct Room {
  alignas(T) unsigned char bytes[sizeof(T)];
  DPCOMM_DEVICE T& get() { return *reinterpret_cast<T*>(bytes); }
};

inline constexpr size_t kGeneratorBytes = [] {
  size_t most = 0;
#define DPCOMM_ALGORITHM(collective, name, Class)           \
  static_assert(Class::kChannelLanes <= kMaxScheduleLanes); \
  static_assert(Class::kLanes <= kMaxScheduleLanes);        \
  static_assert(std::is_trivially_destructible_v<Class>);   \
  static_assert(alignof(Class) <= 8);                       \
  if (sizeof(Class) > most) most = sizeof(Class);
#include "schedule/algorithms.def"
#undef DPCOMM_ALGORITHM
  return most;
}();

/// A flag to be stored.
struct Publication {
  uint64_t* flag;
  uint64_t value;
};

/// What the block knows. In shared memory.
struct Block {
  Command command;
  bool over;     ///< leave: all steps are done, or ...
  bool aborted;  ///< ... the operation is
  RankState rank;
  uint32_t cta;
  uint32_t lane;           ///< of the schedule
  uint32_t first_lane;     ///< of the channels that the schedule uses
  uint32_t channel_lanes;  ///< their number
  uint32_t step_number;
  // The channels, by lane from first_lane on, then by peer.
  ChannelEnds ends[kMaxScheduleLanes * kMaxDeviceRanks];
  ChannelCounts counts[kMaxScheduleLanes * kMaxDeviceRanks];  ///< at the start
  uint32_t received[kMaxScheduleLanes * kMaxDeviceRanks];     ///< since then, by this block
  uint32_t sent[kMaxScheduleLanes * kMaxDeviceRanks];
  // The generator, and what it is about.
  alignas(8) unsigned char generator[kGeneratorBytes];
  bool generating;  ///< it is in the middle of a round
  Room<ScheduleParams> params;
  Room<Step> step;
  Room<Partition> partition;
  Room<Partition::Round> cut;  ///< of the round
  uint64_t at_round;
  uint64_t rounds;
  uint64_t first;  ///< element of the tensor, or of each block, at which the CTA's part begins
  // What the step publishes.
  Publication arrivals[kMaxDeviceRanks];
  Publication credits[kMaxDeviceRanks];
};

/// Kernels that reduce serve the schedules that do, the one that copies all others. A barrier
/// runs one_shot without elements, so that has both.
template <bool kReduces, class Schedule>
DPCOMM_HD constexpr bool is_served(Collective collective) {
  return reduces(collective) == kReduces || std::is_same_v<Schedule, OneShotAllReduce>;
}

/// Calls visitor(std::type_identity<Schedule>()) for the schedule at `index`, if it is served.
template <bool kReduces, class Visitor>
DPCOMM_DEVICE void with_schedule(int index, Visitor visitor) {
  int i = 0;
#define DPCOMM_ALGORITHM(collective, name, Class)                     \
  if constexpr (is_served<kReduces, Class>(Collective::collective)) { \
    if (index == i) visitor(std::type_identity<Class>());             \
  }                                                                   \
  ++i;
#include "schedule/algorithms.def"
#undef DPCOMM_ALGORITHM
}

/// Makes the generator anew if `make`, and takes the next step from it. False: its round is over.
template <bool kReduces>
DPCOMM_DEVICE bool generate(Block& block, int algorithm, bool make) {
  bool found = false;
  with_schedule<kReduces>(algorithm, [&]<class Schedule>(std::type_identity<Schedule>) {
    if (make) new (block.generator) Schedule(block.params.get(), static_cast<int>(block.lane));
    found = reinterpret_cast<Schedule*>(block.generator)->next(block.step.get());
  });
  return found;
}

/// Thread 0: which part of which schedule the block runs.
template <bool kReduces>
DPCOMM_DEVICE void begin(Block& block, const KernelArgs& args) {
  load_struct(block.rank, args.ranks + block_y());
  const RankState& rank = block.rank;
  // The operation before may have been left halfway: its counts were not kept. Host memory is far
  // away: asked first, looked at last.
  const uint32_t abort = load_word_relaxed(rank.abort);
  const Collective collective = static_cast<Collective>(args.collective);
  block.params.get() = ScheduleParams{rank.rank, rank.world, args.root, args.slices};
  int chunks = 1;
  uint32_t lanes = 1;
  with_schedule<kReduces>(args.algorithm, [&]<class Schedule>(std::type_identity<Schedule>) {
    chunks = Schedule::chunks(block.params.get());
    lanes = Schedule::kLanes;
    block.first_lane = Schedule::kFirstLane;
    block.channel_lanes = Schedule::kChannelLanes;
  });
  block.cta = block_x() / lanes;
  block.lane = block_x() % lanes;
  const Range part = cta_part(args.count, args.grain, args.ctas, static_cast<int>(block.cta));
  block.first = part.first;
  new (&block.partition) Partition(part.count, chunks, args.slices, args.slot_elems, args.grain,
                                   is_blocked(collective));
  block.at_round = 0;
  block.rounds = collective == Collective::kBarrier ? 1 : block.partition.get().rounds();
  block.generating = false;
  block.step_number = 0;
  block.over = false;
  Command& command = block.command;
  const ReduceOp op = static_cast<ReduceOp>(args.op);
  command.op = combiner(op);
  command.premultiply = kReduces && op == ReduceOp::kPremulSum;
  command.factor = args.factor;
  block.aborted = abort != 0;
  if (block.aborted) block.rounds = 0;
}

/// All threads: takes over the tables of the channels.
DPCOMM_DEVICE void load_tables(Block& block) {
  const RankState& rank = block.rank;
  const uint32_t channels = block.channel_lanes * rank.world;
  const uint32_t from = (block.cta * rank.channel_lanes + block.first_lane) * rank.world;
  constexpr uint32_t kEndWords = sizeof(ChannelEnds) / 8;
  constexpr uint32_t kCountWords = sizeof(ChannelCounts) / 8;
  uint64_t* ends = reinterpret_cast<uint64_t*>(block.ends);
  uint64_t* counts = reinterpret_cast<uint64_t*>(block.counts);
  const char* ends_from = reinterpret_cast<const char*>(rank.ends + from);
  const uint64_t* counts_from = reinterpret_cast<const uint64_t*>(rank.counts + from);
  DPCOMM_NO_UNROLL
  for (uint32_t i = thread(); i < channels * kEndWords; i += threads()) {
    ends[i] = load_one<uint64_t>(ends_from + 8 * i);
  }
  // Those of channels that another lane uses may change at this moment; they are not looked at.
  DPCOMM_NO_UNROLL
  for (uint32_t i = thread(); i < channels * kCountWords; i += threads()) {
    counts[i] = load_flag_relaxed(counts_from + i);
  }
  DPCOMM_NO_UNROLL
  for (uint32_t i = thread(); i < channels; i += threads()) block.received[i] = block.sent[i] = 0;
}

/// All threads: writes back the counts of the channels that this block used.
DPCOMM_DEVICE void store_counts(Block& block) {
  const RankState& rank = block.rank;
  const uint32_t channels = block.channel_lanes * rank.world;
  ChannelCounts* to =
      rank.counts + (block.cta * rank.channel_lanes + block.first_lane) * rank.world;
  DPCOMM_NO_UNROLL
  for (uint32_t i = thread(); i < channels; i += threads()) {
    const ChannelCounts& before = block.counts[i];
    if (block.received[i]) {
      store_flag_relaxed(&to[i].received, before.received + block.received[i]);
    }
    if (block.sent[i]) store_flag_relaxed(&to[i].sent, before.sent + block.sent[i]);
  }
}

/// Thread 0: the next step. False: all are done.
template <bool kReduces>
DPCOMM_DEVICE bool take_step(Block& block, int algorithm) {
  for (; block.at_round < block.rounds; ++block.at_round) {
    const bool make = !block.generating;
    if (make) block.cut.get() = block.partition.get().round(block.at_round);
    block.generating = generate<kReduces>(block, algorithm, make);
    if (block.generating) return true;
  }
  return false;
}

/// Thread 0: what the step does with which elements, of `elem_bytes`.
DPCOMM_DEVICE void write_command(Block& block, const KernelArgs& args, uint32_t elem_bytes) {
  const Step& step = block.step.get();
  const Collective collective = static_cast<Collective>(args.collective);
  const Range slice = block.partition.get().slice(block.cut.get(), step.chunk, step.slice);
  const uint64_t in_block = block.first + slice.first;
  const uint64_t in_tensor = step.chunk * args.count + in_block;
  const uint64_t own_at = collective == Collective::kReduceScatter ? in_tensor : in_block;
  const uint64_t output_at = collective == Collective::kAllGather ? in_tensor : in_block;
  Command& command = block.command;
  command.primitive = step.primitive;
  command.elems = static_cast<uint32_t>(slice.count);
  command.sources = step.recv_peers.count();
  command.targets = step.send_peers.count();
  // Of two contributions the order does not matter; the own one is there sooner.
  command.own_place = command.sources > 1 ? step.recv_peers.below(block.rank.rank) : 0;
  command.own_as_sent = step.own_as_sent;
  const bool divide = step.has(kReduce | kCopy) && static_cast<ReduceOp>(args.op) == ReduceOp::kAvg;
  command.divisor = divide ? block.rank.world : 0;
  command.own = static_cast<const char*>(args.input[block_y()]) + own_at * elem_bytes;
  command.output = static_cast<char*>(args.output[block_y()]) + output_at * elem_bytes;
  uint64_t used = 0;
  if (!command.has(kRecv) || command.has(kReduce)) used |= reinterpret_cast<uint64_t>(command.own);
  if (command.has(kCopy)) used |= reinterpret_cast<uint64_t>(command.output);
  command.aligned = used % 16 == 0;
  command.words = used % 4 == 0;
}

/// One thread: waits for `flag`. An arrival is there if the flag's low half is `wanted`, a message;
/// a slot is free if fewer than all slots are in use, `wanted` being the messages sent. False:
/// leave.
DPCOMM_DEVICE bool wait_for(const Block& block, const KernelArgs& args, const uint64_t* flag,
                            WaitKind kind, int32_t peer, uint64_t wanted) {
  const RankState& rank = block.rank;
  const bool arrival = kind == WaitKind::kArrival;
  const uint64_t shown = arrival ? wanted : wanted - rank.slots + 1;
  Patience patience(rank, kind, block.cta, block.lane, block.step_number,
                    static_cast<uint32_t>(shown), args.sequence);
  const auto arrived = [&](uint64_t value) {
    return static_cast<uint32_t>(value) == static_cast<uint32_t>(wanted);
  };
  const auto free = [&](uint64_t value) {
    return wanted - value < static_cast<uint64_t>(rank.slots);
  };
  for (;;) {
    const uint64_t value = load_flag_relaxed(flag);
    if (arrival ? arrived(value) : free(value)) break;
    if (!patience.go_on(peer, static_cast<uint32_t>(value))) return false;
  }
  const uint64_t value = load_flag_acquire(flag);
  patience.done();
  const uint32_t tag = static_cast<uint32_t>(value >> 32);
  if (!arrival || tag == args.tag) return true;
  patience.disagree(peer, tag, args.tag);
  return false;
}

DPCOMM_DEVICE uint32_t slot_of(uint64_t message, int32_t slots) {
  return static_cast<uint32_t>((message - 1) % static_cast<uint64_t>(slots));
}

/// One thread: the i-th peer that the step receives from. False: leave.
DPCOMM_DEVICE bool prepare_source(Block& block, const KernelArgs& args, int32_t i) {
  const RankState& rank = block.rank;
  const Step& step = block.step.get();
  const int32_t peer = step.recv_peers[i];
  const uint32_t channel = (step.recv_lane - block.first_lane) * rank.world + peer;
  const ChannelEnds& ends = block.ends[channel];
  const uint64_t message = block.counts[channel].received + ++block.received[channel];
  const uint32_t slot = slot_of(message, rank.slots);
  block.command.source[step.recv_peers.below(peer)] = ends.recv_slots + slot * rank.slot_bytes;
  block.credits[i] = Publication{ends.peer_credit, message};
  const uint64_t* flag = ends.arrival + slot * (kFlagLineBytes / sizeof(uint64_t));
  return wait_for(block, args, flag, WaitKind::kArrival, peer, message);
}

/// One thread: the i-th peer that the step sends to. False: leave.
DPCOMM_DEVICE bool prepare_target(Block& block, const KernelArgs& args, int32_t i) {
  const RankState& rank = block.rank;
  const Step& step = block.step.get();
  const int32_t peer = step.send_peers[i];
  const uint32_t channel = (step.send_lane - block.first_lane) * rank.world + peer;
  const ChannelEnds& ends = block.ends[channel];
  const uint64_t message = block.counts[channel].sent + ++block.sent[channel];
  const uint32_t slot = slot_of(message, rank.slots);
  block.command.target[i] = ends.send_slots + slot * rank.slot_bytes;
  uint64_t* flag = ends.peer_arrival + slot * (kFlagLineBytes / sizeof(uint64_t));
  block.arrivals[i] = Publication{flag, arrival_value(message, args.tag)};
  return wait_for(block, args, ends.credit, WaitKind::kCredit, peer, message - 1);
}

/// Warp 0: the next command, once all that it needs is there; or `over`.
template <bool kReduces>
DPCOMM_DEVICE void prepare(Block& block, const KernelArgs& args, uint32_t elem_bytes) {
  if (thread() == 0) {
    if (take_step<kReduces>(block, args.algorithm)) {
      write_command(block, args, elem_bytes);
    } else {
      block.over = true;
    }
  }
  warp_sync();
  if (block.over) return;
  const int32_t sources = block.command.sources;
  const int32_t peers = sources + block.command.targets;
  bool leave = false;
  DPCOMM_NO_UNROLL
  for (int32_t i = static_cast<int32_t>(thread()); i < peers; i += 32) {
    const bool there =
        i < sources ? prepare_source(block, args, i) : prepare_target(block, args, i - sources);
    if (!there) leave = true;
  }
  leave = any_in_warp(leave);
  warp_sync();
  if (thread() != 0) return;
  if (leave) block.over = block.aborted = true;
  ++block.step_number;
}

/// Thread 0, after the barrier behind the step's work: makes it known.
DPCOMM_DEVICE void publish(Block& block) {
  const Command& command = block.command;
  if (command.sources + command.targets == 0) return;
  fence_system();
  DPCOMM_NO_UNROLL
  for (int32_t i = 0; i < command.targets; ++i) {
    store_flag_relaxed(block.arrivals[i].flag, block.arrivals[i].value);
  }
  DPCOMM_NO_UNROLL
  for (int32_t i = 0; i < command.sources; ++i) {
    store_flag_relaxed(block.credits[i].flag, block.credits[i].value);
  }
}

/// The kernel: blocks of a multiple of 32 threads, at most kMaxThreads. Steps as the schedule has
/// them; each costs two barriers and a fence.
template <class Wire, bool kReduces>
DPCOMM_DEVICE void run_schedule(const KernelArgs& args) {
  DPCOMM_SHARED(Block, block);
  if (thread() == 0) begin<kReduces>(block, args);
  block_sync();
  load_tables(block);
  block_sync();
  for (;;) {
    if (thread() < 32) prepare<kReduces>(block, args, Wire::Element::kBytes);
    block_sync();  // the command is there
    if (block.over) break;
    perform<Wire>(block.command);
    block_sync();  // all bytes are moved
    if (thread() == 0) publish(block);
  }
  if (!block.aborted) store_counts(block);
}

}  // namespace dpcomm::gpu
