// The least that a kernel can be: any schedule over fp32 on the native wire, SUM, one element at a
// time. The tests of the emulator itself use it, so that they do not depend on the real kernels.
#include "cuda/platform.cuh"
#include "kernels.h"
#include "schedule/registry.h"

namespace dpcomm::emulated {
namespace {

struct Command {
  Step step;
  Range range;
  bool over;
};

class Sample {
 public:
  explicit Sample(const KernelArgs& args)
      : args_(args),
        state_(args.ranks[gpu::block_y()]),
        lane_(gpu::block_x() % kAlgorithms[args.algorithm].lanes),
        cta_(gpu::block_x() / kAlgorithms[args.algorithm].lanes),
        input_(static_cast<const float*>(args.input[gpu::block_y()])),
        output_(static_cast<float*>(args.output[gpu::block_y()])) {}

  void run() {
    visit_schedule(args_.algorithm, [&]<class Schedule>(std::type_identity<Schedule>) {
      const ScheduleParams params{state_.rank, state_.world, args_.root, args_.slices};
      const bool blocked = is_blocked(static_cast<Collective>(args_.collective));
      const Range part = cta_part(args_.count, args_.grain, args_.ctas, cta_);
      const Partition cut(part.count, Schedule::chunks(params), args_.slices, args_.slot_elems,
                          args_.grain, blocked);
      for (size_t round = 0; round < cut.rounds(); ++round) {
        Schedule schedule(params, lane_);
        for (Step step; schedule.next(step);) {
          Range range = cut.slice(round, step.chunk, step.slice);
          range.first += part.first;
          if (!do_step(step, range, blocked ? step.chunk * args_.count : 0)) return;
        }
      }
    });
  }

 private:
  const ChannelEnds& ends(int lane, int peer) const { return state_.ends[index(lane, peer)]; }
  ChannelCounts& counts(int lane, int peer) const { return state_.counts[index(lane, peer)]; }
  size_t index(int lane, int peer) const {
    return (size_t(cta_) * state_.channel_lanes + lane) * state_.world + peer;
  }

  template <class Ready>
  bool wait(const uint64_t* flag, Ready ready) {
    while (!ready(gpu::load_flag_relaxed(flag))) {
      if (gpu::load_word_relaxed(state_.abort) != 0) return false;
      gpu::pause();
    }
    gpu::load_flag_acquire(flag);
    return true;
  }

  bool ready(const Step& step) {
    for (int i = 0; i < step.recv_peers.count(); ++i) {
      const int peer = step.recv_peers[i];
      const uint64_t message = counts(step.recv_lane, peer).received + 1;
      const uint64_t* flag = ends(step.recv_lane, peer).arrival +
                             (message - 1) % state_.slots * (kFlagLineBytes / sizeof(uint64_t));
      const uint64_t due = arrival_value(message, args_.tag);
      if (!wait(flag, [=](uint64_t value) { return value == due; })) return false;
    }
    for (int i = 0; i < step.send_peers.count(); ++i) {
      const int peer = step.send_peers[i];
      const uint64_t sent = counts(step.send_lane, peer).sent, slots = state_.slots;
      if (!wait(ends(step.send_lane, peer).credit,
                [=](uint64_t released) { return sent - released < slots; })) {
        return false;
      }
    }
    return true;
  }

  bool do_step(const Step& step, Range range, size_t base) {
    DPCOMM_SHARED(Command, command);
    if (gpu::thread() == 0) command.over = !ready(step);
    gpu::block_sync();
    if (command.over) return false;
    for (size_t i = gpu::thread(); i < range.count; i += gpu::threads()) {
      move(step, base + range.first + i, range.first + i, i);
    }
    gpu::block_sync();
    if (gpu::thread() == 0) publish(step);
    return true;
  }

  float received(const Step& step, int peer, size_t i) const {
    const uint64_t message = counts(step.recv_lane, peer).received;
    const char* slot =
        ends(step.recv_lane, peer).recv_slots + message % state_.slots * state_.slot_bytes;
    return gpu::load_one<float>(slot + i * sizeof(float));
  }

  /// `flat` is the place in the tensor, `in_block` that within a block.
  void move(const Step& step, size_t flat, size_t in_block, size_t i) const {
    const Collective collective = static_cast<Collective>(args_.collective);
    const size_t from = collective == Collective::kAllGather ? in_block : flat;
    const size_t to = collective == Collective::kReduceScatter ? in_block : flat;
    float value = 0;
    if (step.has(kReduce)) {
      for (int rank = 0, any = 0; rank < state_.world; ++rank) {
        float one = 0;
        bool gives = rank == state_.rank;
        if (gives) one = gpu::load_one<float>(input_ + from);
        for (int k = 0; k < step.recv_peers.count(); ++k) {
          if (step.recv_peers[k] != rank) continue;
          gives = true;
          one = received(step, rank, i);
        }
        if (gives) value = any++ == 0 ? one : value + one;
      }
    } else {
      value = step.has(kRecv) ? received(step, step.recv_peers[0], i)
                              : gpu::load_one<float>(input_ + from);
    }
    if (step.has(kCopy)) gpu::store_one(output_ + to, value);
    for (int k = 0; k < step.send_peers.count(); ++k) {
      const int peer = step.send_peers[k];
      char* slot = ends(step.send_lane, peer).send_slots +
                   counts(step.send_lane, peer).sent % state_.slots * state_.slot_bytes;
      gpu::store_one(slot + i * sizeof(float), value);
    }
  }

  void publish(const Step& step) const {
    gpu::fence_system();
    for (int i = 0; i < step.send_peers.count(); ++i) {
      const int peer = step.send_peers[i];
      const uint64_t message = ++counts(step.send_lane, peer).sent;
      gpu::store_flag_relaxed(
          ends(step.send_lane, peer).peer_arrival +
              (message - 1) % state_.slots * (kFlagLineBytes / sizeof(uint64_t)),
          arrival_value(message, args_.tag));
    }
    for (int i = 0; i < step.recv_peers.count(); ++i) {
      const int peer = step.recv_peers[i];
      gpu::store_flag_relaxed(ends(step.recv_lane, peer).peer_credit,
                              ++counts(step.recv_lane, peer).received);
    }
  }

  const KernelArgs& args_;
  const RankState& state_;
  int lane_;
  int cta_;
  const float* input_;
  float* output_;
};

}  // namespace

KernelBody find_kernel(const std::string& name) {
  if (name != "collective_f32_native") return nullptr;
  return [](const KernelArgs& args) { Sample(args).run(); };
}

}  // namespace dpcomm::emulated
