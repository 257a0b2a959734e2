#include "ranks.h"

#include <algorithm>
#include <cstring>

#include "base/error.h"
#include "cuda/launch_plan.h"
#include "kernels.h"
#include "schedule/registry.h"
#include "staging_names.h"

namespace dpcomm::emulated {
namespace {

constexpr size_t kArenaBytes = size_t{1} << 30;
constexpr int kPoison = 0xb3;
constexpr uint32_t kTag = 0x5eed0000;

Region region(std::string name, size_t bytes, MemoryClass kind, int owner) {
  Region made;
  made.name = std::move(name);
  made.bytes = bytes;
  made.kind = kind;
  made.owner = owner;
  return made;
}

}  // namespace

Ranks::Ranks(const Case& the_case)
    : case_(the_case),
      arena_(kArenaBytes),
      layout_(StagingGeometry{the_case.world, the_case.ctas, the_case.slots, the_case.slot_bytes,
                              the_case.packets}) {
  make_staging();
  make_states();
  for (size_t i = 0; i < case_.operations.size(); ++i) make_tensors(case_.operations[i], i);
}

void Ranks::make_staging() {
  for (int rank = 0; rank < case_.world; ++rank) {
    Region made =
        region(str("staging of rank ", rank), layout_.bytes(), MemoryClass::kStaging, rank);
    made.describe = [this, rank](size_t offset, uint64_t value) {
      return name_in_staging(layout_, rank, offset, value);
    };
    staging_.push_back(arena_.allocate(std::move(made), 0));
  }
  // Nothing may be read from a slot before it is written.
  for (int rank = 0; rank < case_.world; ++rank) {
    for (int peer = 0; peer < case_.world; ++peer) {
      for (int lane = 0; lane < channel_lanes(); ++lane) {
        for (int cta = 0; layout_.has_channel(peer, rank, lane) && cta < case_.ctas; ++cta) {
          std::memset(staging_[rank] + layout_.slots_at(peer, rank, lane, cta), kPoison,
                      case_.slots * case_.slot_bytes);
        }
      }
    }
  }
}

void Ranks::make_states() {
  const int world = case_.world;
  states_ = reinterpret_cast<RankState*>(arena_.allocate(
      region("states of the ranks", world * sizeof(RankState), MemoryClass::kState, 0), 0));
  packets_ = reinterpret_cast<char**>(arena_.allocate(
      region("list of packet buffers", world * sizeof(char*), MemoryClass::kState, 0), 0));
  for (int rank = 0; rank < world; ++rank) packets_[rank] = staging_[rank] + layout_.packets_at();
  for (int rank = 0; rank < world; ++rank) {
    const auto state = [&](const char* name, size_t bytes, MemoryClass kind) {
      Region made = region(str(name, " of rank ", rank), bytes, kind, rank);
      made.abort_word = kind == MemoryClass::kHost && bytes == sizeof(uint32_t);
      return arena_.allocate(std::move(made), 0);
    };
    const std::vector<ChannelEnds> ends = layout_.ends(rank, staging_);
    char* table = state("channel ends", ends.size() * sizeof(ChannelEnds), MemoryClass::kState);
    std::memcpy(table, ends.data(), ends.size() * sizeof(ChannelEnds));
    auto* counts = reinterpret_cast<ChannelCounts*>(
        state("counts", ends.size() * sizeof(ChannelCounts), MemoryClass::kState));
    for (size_t i = 0; i < ends.size(); ++i) counts[i] = pretend_messages(ends[i]);
    abort_words_.push_back(
        reinterpret_cast<uint32_t*>(state("abort word", sizeof(uint32_t), MemoryClass::kHost)));
    waits_.push_back(reinterpret_cast<WaitRecord*>(state(
        "wait records", case_.ctas * kMaxScheduleLanes * sizeof(WaitRecord), MemoryClass::kHost)));
    RankState& made = states_[rank];
    made.rank = rank;
    made.world = world;
    made.slots = case_.slots;
    made.channel_lanes = channel_lanes();
    made.slot_bytes = case_.slot_bytes;
    made.ends = reinterpret_cast<const ChannelEnds*>(table);
    made.counts = counts;
    made.packets = packets_;
    made.packet_capacity = case_.packets;
    made.packet_epoch = reinterpret_cast<uint32_t*>(
        state("packet epochs", case_.ctas * sizeof(uint32_t), MemoryClass::kState));
    made.max_ctas = case_.ctas;
    made.abort = abort_words_[rank];
    made.waits = waits_[rank];
    made.look_every = case_.look_every;
    made.record_after = case_.record_after;
  }
}

/// As if case_.first_message messages had gone before over the channels of `ends`.
ChannelCounts Ranks::pretend_messages(const ChannelEnds& ends) const {
  const uint64_t last = case_.first_message;
  if (ends.credit != nullptr) const_cast<uint64_t&>(*ends.credit) = last;
  const uint64_t slots = case_.slots;
  for (uint64_t message = last > slots ? last - slots + 1 : 1;
       ends.arrival != nullptr && message <= last; ++message) {
    const uint64_t* flag =
        ends.arrival + (message - 1) % slots * (kFlagLineBytes / sizeof(uint64_t));
    const_cast<uint64_t&>(*flag) = arrival_value(message, kTag);
  }
  return ChannelCounts{last, last};
}

void Ranks::make_tensors(const Operation& operation, int number) {
  const Collective collective = static_cast<Collective>(operation.record.collective);
  Tensors& made = tensors_.emplace_back();
  for (int rank = 0; rank < case_.world; ++rank) {
    const auto tensor = [&](const char* name, size_t bytes, size_t offset) {
      return arena_.allocate(region(str(name, " of rank ", rank, ", operation ", number), bytes,
                                    MemoryClass::kTensor, rank),
                             kPoison, offset);
    };
    const size_t output_bytes = operation.output_bytes(case_.world, rank);
    const size_t input_bytes = operation.input_bytes(case_.world);
    const size_t block =
        operation.record.count * size_bytes(static_cast<Dtype>(operation.record.dtype)) * rank;
    char* input = nullptr;
    char* output = nullptr;
    if (operation.in_place && output_bytes > 0) {
      // The smaller one lies in the larger one, at the rank's block.
      char* both = tensor("tensor", std::max(input_bytes, output_bytes), operation.output_offset);
      input = both + (collective == Collective::kAllGather ? block : 0);
      output = both + (collective == Collective::kReduceScatter ? block : 0);
    } else {
      if (operation.has_input(rank)) input = tensor("input", input_bytes, operation.input_offset);
      if (output_bytes > 0) output = tensor("output", output_bytes, operation.output_offset);
    }
    if (operation.has_input(rank)) {
      std::memcpy(input, operation.inputs[rank].data(), operation.inputs[rank].size());
    }
    made.inputs.push_back(input);
    made.outputs.push_back(output);
  }
}

Launch Ranks::make_launch(const Operation& operation, const Tensors& tensors, int first,
                          int ranks) {
  StagingGeometry geometry = layout_.geometry();
  if (case_.plan_slots > 0) geometry.slots = case_.plan_slots;
  uint32_t tag = kTag + static_cast<uint32_t>(operation.record.sequence);
  if (first == case_.other_tag_rank) tag ^= 0x100;
  const LaunchPlan plan = plan_launch(operation.record, tag, geometry, operation.ctas);
  KernelArgs args = plan.args;
  args.ranks = states_ + first;
  for (int y = 0; y < ranks; ++y) {
    args.input[y] = tensors.inputs[first + y];
    args.output[y] = tensors.outputs[first + y];
  }
  const std::string name = kernel_name(plan.kernel);
  const KernelBody body = find_kernel(name);
  if (body == nullptr) throw usage_error("there is no kernel ", name);
  Launch launch;
  launch.name = name;
  launch.blocks_x = plan.blocks_x;
  launch.blocks_y = ranks;
  launch.threads = plan.kernel.packets ? std::min(case_.threads, kPacketThreads) : case_.threads;
  launch.device = launch.stream = launch.first_rank = first;
  launch.body = [args, body] { body(args); };
  return launch;
}

void Ranks::launch(World& world) {
  for (size_t i = 0; i < case_.operations.size(); ++i) {
    const int ranks = case_.virtual_ranks ? case_.world : 1;
    for (int first = 0; first < case_.world; first += ranks) {
      world.launch(make_launch(case_.operations[i], tensors_[i], first, ranks));
    }
  }
}

void Ranks::check() const {
  const std::string damaged = arena_.damaged();
  if (!damaged.empty()) throw Fault("written beyond the ends of: " + damaged);
  for (size_t i = 0; i < case_.operations.size(); ++i) {
    const Operation& operation = case_.operations[i];
    for (int rank = 0; rank < case_.world; ++rank) {
      const std::string& given = operation.inputs[rank];
      if (operation.in_place && operation.output_bytes(case_.world, rank) > 0) continue;
      if (std::memcmp(given.data(), tensors_[i].inputs[rank], given.size()) != 0) {
        throw Fault(str("the input of rank ", rank, " was written to, operation ", i));
      }
    }
  }
}

std::string Ranks::outputs() const {
  std::string all;
  for (size_t i = 0; i < case_.operations.size(); ++i) {
    for (int rank = 0; rank < case_.world; ++rank) {
      const size_t bytes = case_.operations[i].output_bytes(case_.world, rank);
      if (bytes > 0) all.append(tensors_[i].outputs[rank], bytes);
    }
  }
  return all;
}

std::string Ranks::waits() const {
  constexpr const char* kKinds[] = {"none", "arrival", "credit", "packet", "disagree"};
  std::string text;
  for (int rank = 0; rank < case_.world; ++rank) {
    for (int i = 0; i < case_.ctas * kMaxScheduleLanes; ++i) {
      const WaitRecord& record = waits_[rank][i];
      if (record.state == 0) continue;
      text += str("wait kind=", record.state < 5 ? kKinds[record.state] : "?",
                  " rank=", record.rank, " cta=", record.cta, " lane=", record.lane,
                  " step=", record.step, " peer=", record.peer, " seen=", record.seen,
                  " wanted=", record.wanted, " sequence=", record.sequence, "\n");
    }
  }
  return text;
}

}  // namespace dpcomm::emulated
