#include "comm/flight_recorder.h"

#include <unistd.h>

#include <algorithm>
#include <map>
#include <new>
#include <numeric>

#include "base/clock.h"
#include "base/env.h"
#include "base/log.h"

namespace dpcomm {
namespace {

struct Registry {
  std::mutex mutex;
  std::map<int, std::shared_ptr<FlightRecorder>> recorders;
  const pid_t owner = getpid();
};

Registry*& shared_registry() {
  static Registry* registry = new Registry;  // never destroyed
  return registry;
}

Registry& current_registry() {
  Registry* registry = shared_registry();
  // A forked child has no groups, and the parent's locks may be taken: its recorders are lost.
  if (registry->owner != getpid()) new (registry) Registry;
  return *registry;
}

size_t total_of(const std::vector<size_t>& counts) {
  return std::accumulate(counts.begin(), counts.end(), size_t{0});
}

}  // namespace

const char* name(const FlightEntry& entry) {
  if (entry.kind == FlightKind::kSend) return "send";
  if (entry.kind == FlightKind::kRecv) return "recv";
  return name(entry.collective);
}

FlightEntry flight_entry(const Operation& operation, const Choice& choice, int rank, int world) {
  FlightEntry entry;
  entry.collective = operation.collective;
  entry.dtype = operation.dtype;
  entry.op = operation.op;
  entry.wire = choice.wire;
  entry.algorithm = static_cast<uint8_t>(choice.algorithm);
  entry.peer = operation.root;
  entry.timeout_ms = operation.timeout.count();
  entry.uneven = operation.counts.size() == static_cast<size_t>(world);
  const bool root = rank == operation.root;
  const size_t own = entry.uneven ? operation.counts[rank] : operation.count;
  const size_t all = entry.uneven ? total_of(operation.counts) : operation.count * world;
  entry.input_elems = entry.output_elems = own;
  switch (operation.collective) {
    case Collective::kAllGather:
      entry.output_elems = all;
      break;
    case Collective::kReduceScatter:
      entry.input_elems = all;
      break;
    case Collective::kGather:
      entry.output_elems = root ? all : 0;
      break;
    case Collective::kScatter:
      entry.input_elems = root ? all : 0;
      break;
    case Collective::kAllToAll:
      entry.input_elems = all;
      entry.output_elems = entry.uneven ? total_of(operation.recv_counts) : all;
      break;
    case Collective::kBarrier:
      entry.input_elems = entry.output_elems = 0;
      break;
    case Collective::kAllReduce:
    case Collective::kBroadcast:
    case Collective::kReduce:
      break;
  }
  entry.total_elems = all;
  return entry;
}

std::shared_ptr<FlightRecorder> FlightRecorder::of(int global_rank) {
  Registry& registry = current_registry();
  const std::lock_guard lock(registry.mutex);
  auto& recorder = registry.recorders[global_rank];
  if (recorder == nullptr) {
    const auto size = static_cast<size_t>(environment_number(Variable::FLIGHT_RECORDER_SIZE, 0));
    recorder = std::make_shared<FlightRecorder>(global_rank, size,
                                                environment(Variable::FLIGHT_RECORDER_DUMP));
  }
  return recorder;
}

std::vector<std::shared_ptr<FlightRecorder>> FlightRecorder::all() {
  Registry& registry = current_registry();
  const std::lock_guard lock(registry.mutex);
  std::vector<std::shared_ptr<FlightRecorder>> all;
  for (const auto& [rank, recorder] : registry.recorders) all.push_back(recorder);
  return all;
}

void* FlightRecorder::registry() { return shared_registry(); }
void FlightRecorder::share(void* registry) { shared_registry() = static_cast<Registry*>(registry); }

FlightRecorder::FlightRecorder(int global_rank, size_t size, std::string dump_prefix)
    : global_rank_(global_rank), dump_prefix_(std::move(dump_prefix)), ring_(size) {}

uint32_t FlightRecorder::add_group(FlightGroup group) {
  const std::lock_guard lock(mutex_);
  groups_.push_back(std::move(group));
  return static_cast<uint32_t>(groups_.size() - 1);
}

uint64_t FlightRecorder::add(FlightEntry entry) {
  if (ring_.empty()) return 0;
  const std::lock_guard lock(mutex_);
  entry.id = ++last_;
  ring_[(entry.id - 1) % ring_.size()] = std::move(entry);
  return last_;
}

FlightEntry* FlightRecorder::find(uint64_t id) {
  FlightEntry& entry = ring_[(id - 1) % ring_.size()];
  return entry.id == id ? &entry : nullptr;
}

void FlightRecorder::started(uint64_t id, int64_t now) {
  if (id == 0) return;
  const std::lock_guard lock(mutex_);
  FlightEntry* entry = find(id);
  if (entry == nullptr) return;
  entry->state = FlightState::kStarted;
  entry->started_ns = now;
}

void FlightRecorder::completed(uint64_t id, int64_t now) {
  if (id == 0) return;
  const std::lock_guard lock(mutex_);
  FlightEntry* entry = find(id);
  if (entry == nullptr) return;
  entry->state = FlightState::kCompleted;
  entry->completed_ns = now;
}

void FlightRecorder::failed(uint64_t id, const std::string& error) {
  if (id == 0) return;
  const std::lock_guard lock(mutex_);
  if (FlightEntry* entry = find(id)) entry->error = error;
}

void FlightRecorder::met(uint64_t id, int peer, uint64_t sequence) {
  if (id == 0) return;
  const std::lock_guard lock(mutex_);
  FlightEntry* entry = find(id);
  if (entry == nullptr) return;
  entry->peer = peer;
  entry->sequence = sequence;
}

std::vector<FlightEntry> FlightRecorder::entries() const {
  const std::lock_guard lock(mutex_);
  std::vector<FlightEntry> entries;
  const uint64_t kept = std::min<uint64_t>(last_, ring_.size());
  entries.reserve(kept);
  for (uint64_t id = last_ - kept + 1; id <= last_; ++id) {
    entries.push_back(ring_[(id - 1) % ring_.size()]);
  }
  return entries;
}

std::vector<FlightGroup> FlightRecorder::groups() const {
  const std::lock_guard lock(mutex_);
  return groups_;
}

void FlightRecorder::dump_after_failure() const {
  if (dump_prefix_.empty() || ring_.empty()) return;
  try {
    const std::string file = dump(dump_prefix_);
    log_line(LogLevel::kInfo, str("the last operations of rank ", global_rank_, " are in ", file));
  } catch (const std::exception& error) {
    log_line(LogLevel::kWarn, error.what());
  }
}

}  // namespace dpcomm
