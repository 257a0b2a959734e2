#include "cpu/executor.h"

#include <algorithm>
#include <cstring>
#include <optional>

#include "cpu/float_environment.h"

namespace dpcomm {
namespace {

constexpr size_t kTileElems = 2048;  // a multiple of every wire format's block; fits the L1 cache
constexpr size_t kMaxAccumulatorBytes = 8;

}  // namespace

Executor::Executor(Transport& transport, const WaitPolicy& policy,
                   const std::atomic<bool>& interrupted)
    : transport_(transport),
      watch_(transport, interrupted),
      policy_(policy),
      patient_policy_(WaitPolicy::choose_patient()),
      interrupted_(interrupted),
      rank_(transport.rank()),
      world_(transport.world()),
      isa_(best_isa()),
      sum_f32_(sum_f32(isa_)) {
  for (int lane = 0; lane < channel_lanes(); ++lane) {
    for (int peer = 0; peer < world_; ++peer) {
      recv_.push_back(peer == rank_ ? nullptr : &transport.recv_channel(peer, lane));
      send_.push_back(peer == rank_ ? nullptr : &transport.send_channel(peer, lane));
    }
  }
  messages_.resize(world_);
  slots_.resize(world_);
  order_.reserve(world_);
  sources_.reserve(world_);
  destinations_.reserve(world_);
  tile_.resize(kTileElems * kMaxAccumulatorBytes);
  own_tile_.resize(kTileElems * kMaxAccumulatorBytes);
  own_slice_.resize(2 * kTileElems * kMaxAccumulatorBytes);
}

void Executor::run(const Task& task) {
  const FloatEnvironment environment;
  task_ = &task;
  tag_ = task.tag;
  lossy_ = task.wire != WireFormat::kNative;
  premultiplied_ = task.op == ReduceOp::kPremulSum;
  elem_bytes_ = size_bytes(task.dtype);
  tensor_ = &tensor_codec(task.dtype, isa_);
  wire_ = &wire_codec(task.wire, task.dtype, isa_);
  accumulator_ = accumulates_in_fp32(task.dtype) ? &tensor_codec(Dtype::kFloat32, isa_) : tensor_;
  arithmetic_ = &accumulator_ops(task.dtype, isa_);

  const AlgorithmInfo& algorithm = kAlgorithms[task.algorithm];
  const LaneGeometry lane = transport_.geometry(algorithm.first_lane);
  blocks_.reset(task.collective, rank_, world_, task.count, task.counts, task.recv_counts);
  const size_t count = blocks_.largest();
  cut_ = choose_cut({task.algorithm, world_, task.root, count, elem_bytes_, block_elems(task.wire),
                     lane.slots, lane.slot_bytes},
                    wire_->slice_bytes);
  const ScheduleParams params{rank_, world_, task.root, cut_.slices};
  partition_ = Partition(count, algorithm.chunks(params), cut_.slices, cut_.slot_elems, cut_.grain,
                         has_blocks(task.collective));
  visit_schedule(task.algorithm,
                 [&]<class Schedule>(std::type_identity<Schedule>) { drive<Schedule>(params); });
}

template <class Schedule>
void Executor::drive(const ScheduleParams& params) {
  struct Lane {
    std::optional<Schedule> generator;
    size_t round = 0;
    Step step;
    bool over = false;

    void advance(const ScheduleParams& params, int index, size_t rounds) {
      for (; round < rounds; ++round) {
        if (!generator) generator.emplace(params, index);
        if (generator->next(step)) return;
        generator.reset();
      }
      over = true;
    }
  };
  // A barrier has no elements, but its messages are the point of it; those of an all-to-all show
  // that both ends of a pair know of the same number of elements, if only of none.
  const bool always =
      task_->collective == Collective::kBarrier || task_->collective == Collective::kAllToAll;
  const size_t rounds = std::max<size_t>(partition_.rounds(), always);
  Lane lanes[Schedule::kLanes];
  int running = 0;
  for (int i = 0; i < Schedule::kLanes; ++i) {
    lanes[i].advance(params, i, rounds);
    running += !lanes[i].over;
  }
  Waiter waiter(transport_, task_->patient ? patient_policy_ : policy_);
  while (running > 0) {
    bool progressed = false;
    for (int i = 0; i < Schedule::kLanes; ++i) {
      while (!lanes[i].over && try_step(lanes[i].step, lanes[i].round)) {
        progressed = true;
        lanes[i].advance(params, i, rounds);
        running -= lanes[i].over;
      }
    }
    if (progressed) {
      waiter.progressed();
    } else if (waiter.pause() || interrupted_.load()) {
      std::vector<const Step*> waiting;
      for (const Lane& lane : lanes) {
        if (!lane.over) waiting.push_back(&lane.step);
      }
      find_reason(waiting);
    }
  }
  waiter.progressed();
  wait_ns_ += waiter.waited_ns();
}

bool Executor::ready(const Step& step) {
  for (int i = 0; i < step.recv_peers.count(); ++i) {
    if (!recv_channel(step.recv_peers[i], step.recv_lane).try_peek(messages_[i])) return false;
  }
  for (int i = 0; i < step.send_peers.count(); ++i) {
    slots_[i] = send_channel(step.send_peers[i], step.send_lane).try_acquire();
    if (slots_[i] == nullptr) return false;
  }
  return true;
}

/// True for a slice beyond the end of a block that is smaller than others: nobody sends it, as
/// whoever has a part in it knows. (In an order in which a schedule can run with all its messages,
/// it can run without some: what is left waits for no more than before.) The first round is always
/// sent, so that ranks that disagree about a block notice even where one of them takes it for
/// empty.
bool Executor::is_left_out(const Slice& slice, size_t round) const {
  return blocks_.unequal() && slice.elems == 0 && round > 0;
}

bool Executor::try_step(const Step& step, size_t round) {
  const bool unequal = blocks_.unequal();
  Slice slice;
  if (unequal) {
    slice = locate(step, round);
    if (is_left_out(slice, round)) return true;
  }
  if (!ready(step)) return false;
  if (!unequal) slice = locate(step, round);
  for (int i = 0; i < step.recv_peers.count(); ++i) {
    check_message(step.recv_peers[i], messages_[i], slice);
  }
  if (slice.elems > 0) perform(step, slice);
  for (int i = 0; i < step.send_peers.count(); ++i) {
    send_channel(step.send_peers[i], step.send_lane)
        .publish(static_cast<uint32_t>(slice.wire_bytes), slice.tag);
    wire_bytes_ += slice.wire_bytes;
  }
  for (int i = 0; i < step.recv_peers.count(); ++i) {
    recv_channel(step.recv_peers[i], step.recv_lane).release();
  }
  return true;
}

Executor::Slice Executor::locate(const Step& step, size_t round) const {
  const Block block = blocks_.of(step.chunk);
  const Range range = range_of(step, round, block);
  Slice slice;
  slice.elems = range.count;
  slice.wire_bytes = wire_->slice_bytes(range.count);
  // The number of elements goes into the tag where only the two ends of a channel know it.
  slice.tag = tag_;
  if (task_->collective == Collective::kAllToAll) slice.tag ^= static_cast<uint32_t>(block.count);
  if (task_->input != nullptr) {
    slice.own = task_->input + (block.in_input + range.first) * elem_bytes_;
  }
  if (task_->output != nullptr) {
    slice.output = task_->output + (block.in_output + range.first) * elem_bytes_;
  }
  return slice;
}

Range Executor::range_of(const Step& step, size_t round, const Block& block) const {
  if (!blocks_.unequal()) return partition_.slice(round, step.chunk, step.slice);
  const Partition own(block.count, 1, cut_.slices, cut_.slot_elems, cut_.grain, true);
  return round < own.rounds() ? own.slice(round, 0, step.slice) : Range();
}

void Executor::perform(const Step& step, const Slice& slice) {
  if (!step.has(kRecv)) {
    send_own(step, slice);
  } else if (step.has(kReduce)) {
    reduce(step, slice);
  } else {
    receive(step, slice);
  }
}

void Executor::send_own(const Step& step, const Slice& slice) {
  const size_t bytes = slice.elems * elem_bytes_;
  if (step.has(kCopy) && slice.output != slice.own) std::memcpy(slice.output, slice.own, bytes);
  if (!step.has(kSend)) return;
  if (!lossy_ && !(premultiplied_ && reduces(task_->collective))) {
    std::memcpy(slots_[0], slice.own, bytes);
  } else {
    for (size_t first = 0; first < slice.elems; first += kTileElems) {
      const size_t n = std::min(kTileElems, slice.elems - first);
      tensor_->load(tile_.data(), slice.own, slice.elems, first, n);
      if (premultiplied_) arithmetic_->premultiply(tile_.data(), task_->factor, n);
      wire_->store(slots_[0], slice.elems, first, tile_.data(), n, false);
    }
  }
  copy_to_other_slots(step, slice.wire_bytes);
}

void Executor::receive(const Step& step, const Slice& slice) {
  const std::byte* data = messages_[0].data;
  if (step.has(kSend)) {  // verbatim, so that every rank decodes the same bytes
    std::memcpy(slots_[0], data, slice.wire_bytes);
    copy_to_other_slots(step, slice.wire_bytes);
  }
  if (!step.has(kCopy)) return;
  if (!lossy_) {
    std::memcpy(slice.output, data, slice.elems * elem_bytes_);
    return;
  }
  for (size_t first = 0; first < slice.elems; first += kTileElems) {
    const size_t n = std::min(kTileElems, slice.elems - first);
    wire_->load(tile_.data(), data, slice.elems, first, n);
    tensor_->store(slice.output, slice.elems, first, tile_.data(), n, false);
  }
}

void Executor::order_contributions(const Step& step) {
  order_.assign(1, -1);
  const auto rank_at = [&](int position) {
    return position < 0 ? rank_ : step.recv_peers[position];
  };
  for (int i = 0; i < step.recv_peers.count(); ++i) order_.push_back(i);
  std::sort(order_.begin(), order_.end(), [&](int a, int b) { return rank_at(a) < rank_at(b); });
}

void Executor::reduce(const Step& step, const Slice& slice) {
  order_contributions(step);
  if (task_->dtype == Dtype::kFloat32 && !lossy_ && !premultiplied_ &&
      combiner(task_->op) == ReduceOp::kSum) {
    sum_contributions(step, slice);
    return;
  }
  for (size_t first = 0; first < slice.elems; first += kTileElems) {
    reduce_tile(step, slice, first, std::min(kTileElems, slice.elems - first));
  }
  if (step.has(kSend)) copy_to_other_slots(step, slice.wire_bytes);
}

/// fp32 on the native wire: one pass over memory.
void Executor::sum_contributions(const Step& step, const Slice& slice) {
  sources_.clear();
  destinations_.clear();
  for (int position : order_) {
    const std::byte* source = position < 0 ? slice.own : messages_[position].data;
    sources_.push_back(reinterpret_cast<const float*>(source));
  }
  if (step.has(kCopy)) destinations_.push_back(reinterpret_cast<float*>(slice.output));
  for (int i = 0; i < step.send_peers.count(); ++i) {
    destinations_.push_back(reinterpret_cast<float*>(slots_[i]));
  }
  const bool divide = step.has(kCopy) && task_->op == ReduceOp::kAvg;
  sum_f32_(destinations_.data(), static_cast<int>(destinations_.size()), sources_.data(),
           static_cast<int>(sources_.size()), divide ? world_ : 1, slice.elems);
}

/// The own elements [first, first + n) as they enter a reduction, as an accumulator; or null if
/// they can be read from the tensor as they are.
const std::byte* Executor::own_contribution(const Step& step, const Slice& slice, size_t first,
                                            size_t n) {
  const bool as_sent = step.own_as_sent && lossy_;
  if (!premultiplied_ && !as_sent) return nullptr;
  tensor_->load(own_tile_.data(), slice.own, slice.elems, first, n);
  if (premultiplied_) arithmetic_->premultiply(own_tile_.data(), task_->factor, n);
  if (as_sent) wire_->store(own_slice_.data(), n, 0, own_tile_.data(), n, true);
  return own_tile_.data();
}

void Executor::reduce_tile(const Step& step, const Slice& slice, size_t first, size_t n) {
  const auto combine = static_cast<int>(combiner(task_->op));
  std::byte* sum = tile_.data();
  bool started = false;
  const auto add = [&](const Codec& codec, const std::byte* base, size_t total, size_t from) {
    (started ? codec.combine[combine] : codec.load)(sum, base, total, from, n);
    started = true;
  };
  for (int position : order_) {
    if (position >= 0) {
      add(*wire_, messages_[position].data, slice.elems, first);
    } else if (const std::byte* own = own_contribution(step, slice, first, n)) {
      add(*accumulator_, own, n, 0);
    } else {
      add(*tensor_, slice.own, slice.elems, first);
    }
  }
  if (step.has(kCopy) && task_->op == ReduceOp::kAvg) arithmetic_->divide(sum, world_, n);
  if (step.has(kSend)) wire_->store(slots_[0], slice.elems, first, sum, n, step.has(kCopy));
  if (step.has(kCopy)) tensor_->store(slice.output, slice.elems, first, sum, n, false);
}

void Executor::copy_to_other_slots(const Step& step, size_t bytes) {
  for (int i = 1; i < step.send_peers.count(); ++i) std::memcpy(slots_[i], slots_[0], bytes);
}

}  // namespace dpcomm
