#include "cpu/local_paths.h"

#include <algorithm>
#include <cstring>

#include "base/error.h"
#include "cpu/float_environment.h"
#include "transport/process_memory.h"

namespace dpcomm {
namespace {

constexpr size_t kSmallBytes = size_t{8} << 10;        // that a rank reads from others in one_shot
constexpr size_t kBroadcastBytes = size_t{256} << 10;  // up to here the root need not wait
constexpr size_t kOfferBytes = size_t{1} << 10;        // from here on a heap beats a slot
constexpr size_t kStreamBytes = size_t{16} << 20;      // from here on tensors do not fit the caches
constexpr size_t kScratchBytes = size_t{256} << 10;
constexpr size_t kReadBytes = size_t{1} << 20;  // between two looks at the abort flag
constexpr size_t kGrain = 64;
constexpr int kQuickLooks = 48;  // about 1 us

// Counters of the board.
constexpr int kIn = 0, kReduced = 1, kLeft = 2;

/// What a rank of an all-to-all has for another one, in elements of its input.
struct Portion {
  uint64_t first = 0;
  uint64_t count = 0;
};

/// Runs on the board if it is small or large at all.
bool is_symmetric(Collective collective) {
  switch (collective) {
    case Collective::kAllReduce:
    case Collective::kBarrier:
    case Collective::kBroadcast:
    case Collective::kAllGather:
    case Collective::kReduceScatter:
    case Collective::kAllToAll:
      return true;
    default:
      return false;
  }
}

/// Bytes that the rank with the most of it contributes.
size_t contribution(Collective collective, size_t count, size_t elem_bytes, int world) {
  const bool blocks =
      collective == Collective::kReduceScatter || collective == Collective::kAllToAll;
  return count * elem_bytes * (blocks ? world : 1);
}

}  // namespace

Path choose_path(Collective collective, size_t count, size_t elem_bytes, bool unequal,
                 const HostFacts& host) {
  if (host.slot_bytes == 0 || host.world < 2 || !is_symmetric(collective)) return Path::kChannels;
  if (collective == Collective::kBarrier) return Path::kSmall;
  const bool readable = host.reach != Reach::kNone;
  if (collective == Collective::kAllToAll) {
    // Nobody knows the sizes of others, so the path cannot depend on them.
    const bool fits = host.world * sizeof(Portion) <= host.slot_bytes;
    return readable && fits ? Path::kLarge : Path::kChannels;
  }
  const size_t bytes = contribution(collective, count, elem_bytes, host.world);
  if (collective == Collective::kBroadcast) {
    return readable && bytes > kBroadcastBytes ? Path::kLarge : Path::kChannels;
  }
  if (!unequal && bytes <= host.slot_bytes && bytes * (host.world - 1) <= kSmallBytes) {
    return Path::kSmall;
  }
  if (collective == Collective::kAllReduce || readable) return Path::kLarge;
  return Path::kChannels;
}

LocalPaths::LocalPaths(Transport& transport, const WaitPolicy& policy,
                       const std::atomic<bool>& interrupted)
    : transport_(transport),
      board_(transport.board()),
      policy_(policy),
      patient_policy_(WaitPolicy::choose_patient()),
      watch_(transport, interrupted),
      interrupted_(interrupted),
      rank_(transport.rank()),
      world_(transport.world()),
      quick_looks_(policy.spin_ns > 0 ? kQuickLooks : 1),
      copy_streaming_(copy_streaming(best_isa())),
      reduction_(best_isa()),
      single_copy_bytes_(transport.single_copy_bytes()) {
  locations_.resize(world_);
  heaps_.resize(world_);
  sources_.resize(world_);
  destinations_.resize(world_);
}

LocalPaths::~LocalPaths() = default;

HostFacts LocalPaths::facts() const {
  if (board_ == nullptr) return HostFacts{world_, 0, Reach::kNone};
  return HostFacts{world_, board_->layout().slot_bytes, transport_.reach()};
}

void LocalPaths::run(const Task& task, Path path) {
  const FloatEnvironment environment;
  task_ = &task;
  elem_bytes_ = size_bytes(task.dtype);
  tag_ = task.tag ^ task.history;  // so that a disagreement before this one shows
  ++epoch_;
  blocks_.reset(task.collective, rank_, world_, task.count, task.counts, task.recv_counts);
  if (reduces(task.collective)) reduction_.prepare(task.dtype, task.op, task.factor, world_);
  path == Path::kSmall ? run_small() : run_large();
}

// --- meeting

template <class Ready>
void LocalPaths::wait(int rank, Ready ready) {
  for (int i = 0; i < quick_looks_ && !task_->patient; ++i) {
    if (ready()) return;
    cpu_pause();
  }
  if (ready()) return;
  Waiter waiter(transport_, task_->patient ? patient_policy_ : policy_);
  while (!ready()) {
    if (!waiter.pause() && !interrupted_.load()) continue;
    watch_.look(*task_, [&] { return std::vector<int>{rank}; });
  }
  waiter.progressed();
  wait_ns_ += waiter.waited_ns();
}

void LocalPaths::arrive(Where where) {
  Arrival& own = board_->arrival(rank_, epoch_);
  own.tag = tag_;
  own.where = where;
  board_->arrive(epoch_);
}

void LocalPaths::meet() {
  for (int rank = 0; rank < world_; ++rank) {
    if (rank == rank_) continue;
    wait(rank, [&] { return board_->has_arrived(rank, epoch_); });
    if (board_->arrival(rank, epoch_).tag == tag_) continue;
    watch_.check_disagreement(*task_);
    throw internal_error(describe(task_->record), ": ", transport_.describe(rank_),
                         " met another operation of ", transport_.describe(rank));
  }
}

void LocalPaths::count(int counter) {
  if (transport_.failed()) watch_.look(*task_, [] { return std::vector<int>(); });
  ++counts_[counter];
  board_->count(counter);
}

void LocalPaths::wait_for(int counter) {
  for (int rank = 0; rank < world_; ++rank) {
    if (rank == rank_) continue;
    wait(rank, [&] { return board_->counted(rank, counter) >= counts_[counter]; });
  }
}

void LocalPaths::meet_at(int counter) {
  count(counter);
  wait_for(counter);
}

// --- small

void LocalPaths::run_small() {
  const Task& task = *task_;
  input_bytes_ = task.collective == Collective::kBarrier
                     ? 0
                     : contribution(task.collective, task.count, elem_bytes_, world_);
  const bool zero_copy =
      task.collective == Collective::kAllReduce && input_bytes_ >= kOfferBytes && offer_tensor();
  if (zero_copy) {
    arrive(Where::kHeap);
  } else {
    stage_input();
    arrive(input_bytes_ <= kInlineBytes ? Where::kInline : Where::kSlot);
  }
  meet();
  if (input_bytes_ >= kOfferBytes && task.collective == Collective::kAllReduce) {
    int offers = 0;
    for (int rank = 0; rank < world_; ++rank) {
      offers += board_->arrival(rank, epoch_).where == Where::kHeap;
    }
    if (offers > 0) {
      introduce_heaps();
      if (offers == world_ && all_in_heaps()) return push();
      if (zero_copy) stage_input();
      meet_at(kIn);  // those who had offered their tensors have put them into their slots
    }
  }
  finish_small();
}

/// Puts this rank's contribution where the others find it.
void LocalPaths::stage_input() {
  if (input_bytes_ == 0) return;
  std::byte* to = input_bytes_ <= kInlineBytes ? board_->arrival(rank_, epoch_).data
                                               : board_->slot(rank_, epoch_);
  std::memcpy(to, task_->input, input_bytes_);
}

const std::byte* LocalPaths::staged(int rank) const {
  return input_bytes_ <= kInlineBytes ? board_->arrival(rank, epoch_).data
                                      : board_->slot(rank, epoch_);
}

void LocalPaths::finish_small() {
  const Task& task = *task_;
  const size_t block = task.count * elem_bytes_;
  if (input_bytes_ == 0) return;
  std::byte* output = task.output;
  switch (task.collective) {
    case Collective::kAllReduce:
    case Collective::kReduceScatter: {
      const size_t first = task.collective == Collective::kReduceScatter ? rank_ * block : 0;
      for (int rank = 0; rank < world_; ++rank) {
        sources_[rank] = (rank == rank_ ? task.input : staged(rank)) + first;
      }
      reduction_.run(sources_.data(), world_, &output, 1, task.count);
      break;
    }
    default:  // all-gather
      for (int rank = 0; rank < world_; ++rank) {
        std::byte* to = output + rank * block;
        if (rank == rank_ && to == task.input) continue;
        std::memcpy(to, rank == rank_ ? task.input : staged(rank), block);
      }
  }
  wire_bytes_ += (world_ - 1) * input_bytes_;
}

// --- large

/// Writes where this rank's tensors lie into its arrival; true if all of them are in its heap.
bool LocalPaths::offer_tensor() {
  Location own;
  own.input = reinterpret_cast<uint64_t>(task_->input);
  own.output = reinterpret_cast<uint64_t>(task_->output);
  const bool reads = has_input(task_->collective, rank_, task_->root) && input_bytes_ > 0;
  const bool all_reduce = task_->collective == Collective::kAllReduce;
  std::optional<uint64_t> input, output;
  if (reads) input = SharedHeap::offset_of(task_->input, input_bytes_);
  if (all_reduce) output = SharedHeap::offset_of(task_->output, input_bytes_);
  const bool in_heap = (!reads || input) && (!all_reduce || output) && (reads || all_reduce);
  if (in_heap) {
    const HeapHandle heap = SharedHeap::handle();
    own.heap_base = input ? own.input - *input : own.output - *output;
    own.heap_id = heap.id;
    own.heap_bytes = heap.bytes;
    own.heap_fd = heap.fd;
  }
  std::memcpy(board_->arrival(rank_, epoch_).data, &own, sizeof(own));
  return in_heap || !reads;
}

/// Maps the heaps that are offered for the first time. All ranks see the same offers, and a heap
/// counts once all ranks have it.
void LocalPaths::introduce_heaps() {
  bool news = false, failed = false;
  std::vector<int> fresh;
  for (int rank = 0; rank < world_; ++rank) {
    const Arrival& arrival = board_->arrival(rank, epoch_);
    std::memcpy(&locations_[rank], arrival.data, sizeof(Location));
    const Location& location = locations_[rank];
    if (arrival.where != Where::kHeap || location.heap_id == 0) continue;
    if (heaps_[rank].id == location.heap_id) continue;
    news = true;
    fresh.push_back(rank);
    Heap& heap = heaps_[rank];
    heap = Heap{location.heap_id, false, nullptr};
    const HeapHandle own = SharedHeap::handle();
    if (own.id == location.heap_id) continue;
    try {
      heap.memory = std::make_unique<PeerHeap>(
          static_cast<pid_t>(transport_.process_id(rank)),
          HeapHandle{location.heap_id, location.heap_fd, location.heap_bytes});
    } catch (const Error&) {
      failed = true;
    }
  }
  if (!news) return;
  // Whoever could not map one says so in the bounce buffer after the next one, which is free; the
  // next one may hold a chunk already.
  const auto verdict = [&](int rank) { return board_->bounce(rank, chunks_ + 1); };
  *verdict(rank_) = std::byte{failed};
  meet_at(kIn);
  bool all = true;
  for (int rank = 0; rank < world_; ++rank) {
    all = all && *verdict(rank) == std::byte{0};
  }
  for (const int rank : fresh) heaps_[rank].shared = all;
  meet_at(kIn);  // the verdicts have been read
}

bool LocalPaths::all_in_heaps() {
  for (int rank = 0; rank < world_; ++rank) {
    if (board_->arrival(rank, epoch_).where != Where::kHeap) return false;
    const uint64_t id = locations_[rank].heap_id;
    if (id != 0 && (heaps_[rank].id != id || !heaps_[rank].shared)) return false;
  }
  return true;
}

const std::byte* LocalPaths::mapped_input(int rank, size_t first, size_t bytes) const {
  if (rank == rank_) return task_->input + first;
  const PeerHeap* heap = heaps_[rank].memory.get();
  const uint64_t offset = locations_[rank].input - locations_[rank].heap_base + first;
  return heap != nullptr ? heap->at(offset, bytes) : SharedHeap::at(offset, bytes);
}

std::byte* LocalPaths::mapped_output(int rank, size_t first, size_t bytes) const {
  if (rank == rank_) return task_->output + first;
  const PeerHeap* heap = heaps_[rank].memory.get();
  const uint64_t offset = locations_[rank].output - locations_[rank].heap_base + first;
  return heap != nullptr ? heap->at(offset, bytes) : SharedHeap::at(offset, bytes);
}

/// A rank's part of `bytes` bytes, cut at cache lines.
LocalPaths::Part LocalPaths::part_of(int rank, size_t bytes) const {
  const size_t unit = std::max(kGrain, elem_bytes_);
  const size_t units = (bytes + unit - 1) / unit;
  const size_t each = (units + world_ - 1) / world_ * unit;
  const size_t first = std::min(bytes, each * rank);
  return Part{first, std::min(each, bytes - first)};
}

size_t LocalPaths::own_input_bytes() const {
  const Collective collective = task_->collective;
  if (!blocks_.unequal()) return contribution(collective, task_->count, elem_bytes_, world_);
  if (collective == Collective::kAllGather) return blocks_.of(rank_).count * elem_bytes_;
  size_t elems = 0;
  const int first = collective == Collective::kAllToAll ? rank_ * world_ : 0;
  for (int i = 0; i < world_; ++i) elems += blocks_.of(first + i).count;
  return elems * elem_bytes_;
}

/// Says in the slot where the others find what this rank has for them.
void LocalPaths::write_portions() {
  auto* portions = reinterpret_cast<Portion*>(board_->slot(rank_, epoch_));
  for (int rank = 0; rank < world_; ++rank) {
    const Block block = blocks_.of(rank_ * world_ + rank);
    portions[rank] = Portion{block.in_input, block.count};
  }
}

void LocalPaths::exchange_portions() {
  for (int i = 0; i < world_; ++i) {
    const int rank = (rank_ + i) % world_;
    const Block block = blocks_.of(rank * world_ + rank_);
    Portion portion;
    std::memcpy(&portion, board_->slot(rank, epoch_) + rank_ * sizeof(Portion), sizeof(portion));
    if (portion.count != block.count) {
      throw usage_error("ranks disagree: ", transport_.describe(rank), " sends ", portion.count,
                        " elements to ", transport_.describe(rank_), ", which expects ",
                        block.count, ", in ", describe(task_->record));
    }
    std::byte* to = task_->output + block.in_output * elem_bytes_;
    const size_t bytes = block.count * elem_bytes_;
    if (bytes == 0) continue;
    if (i == 0) {
      std::memcpy(to, task_->input + portion.first * elem_bytes_, bytes);
    } else {
      read_input(rank, portion.first * elem_bytes_, to, bytes);
    }
  }
}

void LocalPaths::run_large() {
  const Task& task = *task_;
  const bool reduces_all = task.collective == Collective::kAllReduce;
  input_bytes_ = own_input_bytes();
  if (task.collective == Collective::kAllToAll) write_portions();
  const bool in_heap = offer_tensor();
  const bool bounces = reduces_all && input_bytes_ < single_copy_bytes_;
  if (bounces && !in_heap) copy_in(0);  // with the arrival; most likely nobody's is in a heap
  arrive(in_heap ? Where::kHeap : Where::kPrivate);
  meet();
  introduce_heaps();
  mapped_ = all_in_heaps();
  if (!reduces_all) return move_blocks();
  if (mapped_) return push();
  if (!bounces) return pull();
  bool all_copied = true;
  for (int rank = 0; rank < world_; ++rank) {
    all_copied = all_copied && board_->arrival(rank, epoch_).where == Where::kPrivate;
  }
  if (!all_copied) {
    if (in_heap) copy_in(0);
    meet_at(kIn);
  }
  bounce();
}

/// Zero copy.
void LocalPaths::push() {
  const Part part = part_of(rank_, input_bytes_);
  const bool streams = input_bytes_ >= kStreamBytes;
  const size_t tile = kReadBytes;
  try {
    for (size_t done = 0; done < part.bytes; done += tile) {
      const size_t bytes = std::min(tile, part.bytes - done);
      if (transport_.failed()) watch_.look(*task_, [] { return std::vector<int>(); });
      for (int rank = 0; rank < world_; ++rank) {
        sources_[rank] = mapped_input(rank, part.first + done, bytes);
        destinations_[rank] = mapped_output(rank, part.first + done, bytes);
      }
      std::swap(destinations_[0], destinations_[rank_]);
      reduction_.run(sources_.data(), world_, destinations_.data(), world_, bytes / elem_bytes_,
                     streams);
    }
    wire_bytes_ += part.bytes * (world_ - 1) * 2;
    meet_at(kReduced);
  } catch (...) {
    // A peer that is late may still write here: nobody else may get this memory.
    SharedHeap::keep(task_->output);
    throw;
  }
}

void LocalPaths::read(int rank, uint64_t address, void* to, size_t bytes) {
  auto* out = static_cast<std::byte*>(to);
  for (size_t done = 0; done < bytes; done += kReadBytes) {
    const size_t now = std::min(kReadBytes, bytes - done);
    if (transport_.failed()) watch_.look(*task_, [] { return std::vector<int>(); });
    if (read_memory(transport_.process_id(rank), address + done, out + done, now)) continue;
    // Most likely it is gone, or has given up and freed its tensor.
    watch_.look(*task_, [&] { return std::vector<int>{rank}; });
    throw internal_error(describe(task_->record), ": ", transport_.describe(rank_), " cannot read ",
                         now, " bytes from the memory of ", transport_.describe(rank));
  }
  wire_bytes_ += bytes;
}

/// Single copy.
void LocalPaths::pull() {
  const Part part = part_of(rank_, input_bytes_);
  const size_t peers = world_ - 1;
  const size_t tile = std::max(kScratchBytes / peers / kGrain * kGrain, size_t{16} << 10);
  if (scratch_.size() < tile * peers) scratch_.resize(tile * peers);
  for (size_t done = 0; done < part.bytes; done += tile) {
    const size_t bytes = std::min(tile, part.bytes - done);
    std::byte* room = scratch_.data();
    for (int rank = 0; rank < world_; ++rank) {
      if (rank == rank_) {
        sources_[rank] = task_->input + part.first + done;
        continue;
      }
      read(rank, locations_[rank].input + part.first + done, room, bytes);
      sources_[rank] = room;
      room += tile;
    }
    std::byte* to = task_->output + part.first + done;
    reduction_.run(sources_.data(), world_, &to, 1, bytes / elem_bytes_);
  }
  count(kReduced);
  for (int i = 1; i < world_; ++i) {
    const int rank = (rank_ + i) % world_;
    wait(rank, [&] { return board_->counted(rank, kReduced) >= counts_[kReduced]; });
    const Part other = part_of(rank, input_bytes_);
    read(rank, locations_[rank].output + other.first, task_->output + other.first, other.bytes);
  }
  meet_at(kLeft);
}

/// The i-th chunk of an all-reduce through the bounce buffers, in bytes of the tensor.
LocalPaths::Part LocalPaths::chunk_of(size_t i) const {
  const size_t unit = std::max(kGrain, elem_bytes_) * world_;
  const size_t chunk = std::max(board_->layout().bounce_bytes / unit * unit, unit);
  const size_t first = std::min(input_bytes_, i * chunk);
  return Part{first, std::min(chunk, input_bytes_ - first)};
}

/// Copies the others' parts of a chunk of this rank's contribution to where they read them.
void LocalPaths::copy_in(size_t i) {
  const Part chunk = chunk_of(i);
  const Part own = part_of(rank_, chunk.bytes);
  const size_t behind = own.first + own.bytes;
  std::byte* to = board_->bounce(rank_, chunks_ + i);
  std::memcpy(to, task_->input + chunk.first, own.first);
  std::memcpy(to + behind, task_->input + chunk.first + behind, chunk.bytes - behind);
}

/// The first chunk has been copied in by all.
///
/// Three buffers suffice: chunk i + 1 goes where chunk i - 2 was, whose results the others have
/// read before they said that chunk i - 1 is reduced, for which this rank has waited.
void LocalPaths::bounce() {
  for (size_t i = 0;; ++i) {
    const Part chunk = chunk_of(i);
    const bool last = chunk.first + chunk.bytes == input_bytes_;
    if (!last) copy_in(i + 1);
    reduce_chunk(i);
    for (int step = 1; step < world_; ++step) {
      const int rank = (rank_ + step) % world_;
      wait(rank, [&] { return board_->counted(rank, kReduced) >= counts_[kReduced]; });
      const Part part = part_of(rank, chunk.bytes);
      std::memcpy(task_->output + chunk.first + part.first,
                  board_->bounce(rank, chunks_ + i) + part.first, part.bytes);
    }
    if (!last) continue;
    chunks_ += i + 1;
    break;
  }
  wire_bytes_ += 2 * (input_bytes_ - input_bytes_ / world_);
}

/// Reduces this rank's part of a chunk. The others have copied it in before they said that the
/// chunk before it is reduced, for which this rank has waited.
void LocalPaths::reduce_chunk(size_t i) {
  const Part chunk = chunk_of(i);
  const Part own = part_of(rank_, chunk.bytes);
  for (int rank = 0; rank < world_; ++rank) {
    if (rank == rank_) {
      sources_[rank] = task_->input + chunk.first + own.first;
      continue;
    }
    sources_[rank] = board_->bounce(rank, chunks_ + i) + own.first;
  }
  destinations_[0] = task_->output + chunk.first + own.first;
  destinations_[1] = board_->bounce(rank_, chunks_ + i) + own.first;
  reduction_.run(sources_.data(), world_, destinations_.data(), 2, own.bytes / elem_bytes_);
  count(kReduced);
}

void LocalPaths::read_input(int rank, size_t first, void* to, size_t bytes) {
  if (bytes == 0) return;
  if (!mapped_) return read(rank, locations_[rank].input + first, to, bytes);
  const std::byte* from = mapped_input(rank, first, bytes);
  bytes >= kStreamBytes ? copy_streaming_(to, from, bytes) : (void)std::memcpy(to, from, bytes);
  wire_bytes_ += bytes;
}

/// Everything but an all-reduce: each rank reads what it needs from the others' inputs.
void LocalPaths::move_blocks() {
  const Task& task = *task_;
  const auto keep_own = [](std::byte* to, const std::byte* from, size_t bytes) {
    if (to != nullptr && to != from && bytes > 0) std::memcpy(to, from, bytes);
  };
  switch (task.collective) {
    case Collective::kBroadcast:
      if (rank_ == task.root) {
        keep_own(task.output, task.input, input_bytes_);
      } else {
        read_input(task.root, 0, task.output, input_bytes_);
      }
      break;
    case Collective::kReduceScatter: {
      const Block own = blocks_.of(rank_);
      reduce_block(own.in_input * elem_bytes_, own.count * elem_bytes_, task.output);
      break;
    }
    case Collective::kAllGather:
      for (int i = 0; i < world_; ++i) {
        const int rank = (rank_ + i) % world_;
        const Block block = blocks_.of(rank);
        std::byte* to = task.output + block.in_output * elem_bytes_;
        if (i == 0) {
          keep_own(to, task.input, block.count * elem_bytes_);
        } else {
          read_input(rank, 0, to, block.count * elem_bytes_);
        }
      }
      break;
    default:
      exchange_portions();
  }
  meet_at(kLeft);
}

/// Reduces bytes [first, first + bytes) of all inputs into `to`.
void LocalPaths::reduce_block(size_t first, size_t bytes, std::byte* to) {
  const size_t peers = world_ - 1;
  const size_t tile = std::max(kScratchBytes / peers / kGrain * kGrain, size_t{16} << 10);
  if (!mapped_ && scratch_.size() < tile * peers) scratch_.resize(tile * peers);
  for (size_t done = 0; done < bytes; done += tile) {
    const size_t now = std::min(tile, bytes - done);
    std::byte* room = scratch_.data();
    for (int rank = 0; rank < world_; ++rank) {
      if (rank == rank_) {
        sources_[rank] = task_->input + first + done;
      } else if (mapped_) {
        sources_[rank] = mapped_input(rank, first + done, now);
        wire_bytes_ += now;
      } else {
        read(rank, locations_[rank].input + first + done, room, now);
        sources_[rank] = room;
        room += tile;
      }
    }
    std::byte* out = to + done;
    reduction_.run(sources_.data(), world_, &out, 1, now / elem_bytes_);
  }
}

}  // namespace dpcomm
