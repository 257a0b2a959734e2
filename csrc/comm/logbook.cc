#include "comm/logbook.h"

#include <unistd.h>

#include <numeric>

#include "base/clock.h"
#include "base/log.h"
#include "cpu/diagnosis.h"
#include "schedule/registry.h"
#include "wire/codec.h"

namespace dpcomm {
namespace {

/// The ranks of a group among all of the job.
std::vector<int> global_ranks(const CommunicatorOptions& options, int world) {
  if (options.global_ranks.size() == static_cast<size_t>(world)) return options.global_ranks;
  std::vector<int> ranks(world);
  std::iota(ranks.begin(), ranks.end(), 0);
  return ranks;
}

/// "send to rank 1 (400 bytes, tag 7)".
std::string describe(const MessageNote& note) {
  const std::string peer = note.peer < 0 ? std::string("any rank") : str("rank ", note.peer);
  return str(note.sends ? "send to " : "recv from ", peer, " (", note.bytes, " bytes, tag ",
             note.tag, ")");
}

double milliseconds_of(int64_t ns) { return static_cast<double>(ns / 1000) / 1e3; }

}  // namespace

Logbook::Logbook(int rank, int world, const CommunicatorOptions& options)
    : rank_(rank),
      world_(world),
      name_(options.name),
      exposed_wait_ns_(std::make_shared<std::atomic<uint64_t>>(0)) {
  FlightGroup group{options.name, rank, global_ranks(options, world)};
  recorder_ = FlightRecorder::of(group.global_ranks[rank]);
  group_ = recorder_->add_group(std::move(group));
}

uint64_t Logbook::given(const Operation& operation, const Choice& choice,
                        std::chrono::milliseconds limit, int64_t now, Given how) {
  FlightEntry entry = flight_entry(operation, choice, rank_, world_);
  entry.sequence = ++given_;
  entry.group = group_;
  entry.created_ns = now;
  entry.timeout_ms = limit.count();
  entry.async = how == Given::kWaits;
  if (how == Given::kStarts) {
    entry.started_ns = now;
    entry.state = FlightState::kStarted;
  }
  return recorder_->add(std::move(entry));
}

uint64_t Logbook::given_to_device(const Operation& operation, const Choice& choice,
                                  uint64_t sequence, std::chrono::milliseconds limit) {
  FlightEntry entry = flight_entry(operation, choice, rank_, world_);
  entry.sequence = sequence;
  entry.group = group_;
  entry.created_ns = now_ns();
  entry.timeout_ms = limit.count();
  entry.async = entry.on_device = true;
  DeviceCounter& counter = device_counters_[static_cast<int>(operation.collective)];
  counter.operations.fetch_add(1);
  counter.bytes.fetch_add(operation.count * size_bytes(operation.dtype));
  if (log_enabled(LogLevel::kTrace)) {
    trace(str(name(operation.collective), " #", sequence, " (", operation.count, " x ",
              name(operation.dtype), ", ", kAlgorithms[choice.algorithm].name,
              ") given to the device"));
  }
  return recorder_->add(std::move(entry));
}

void Logbook::device_begins(uint64_t flight) { recorder_->started(flight, now_ns()); }
void Logbook::device_ends(uint64_t flight) { recorder_->completed(flight, now_ns()); }
void Logbook::device_fails(uint64_t flight, const Failure& failure) {
  recorder_->failed(flight, failure.message);
}

void Logbook::begins(uint64_t flight, const OpRecord& record) {
  began_ns_ = record.alive_ns;
  if (flight != 0) recorder_->started(flight, record.alive_ns);
  if (log_enabled(LogLevel::kTrace)) trace(describe(record) + " starts");
}

int64_t Logbook::ends(uint64_t flight, const OpRecord& record, const Cost& cost) {
  const int64_t now = now_ns();
  const int64_t took = now - began_ns_;
  recorder_->completed(flight, now);
  auto& [counts, published] = counters_[record.collective];
  ++counts.totals.operations;
  counts.totals.bytes += cost.bytes;
  counts.totals.wire_bytes += cost.wire_bytes;
  counts.totals.busy_ns += static_cast<uint64_t>(took);
  counts.wait_ns += cost.wait_ns;
  published.write(counts);
  if (log_enabled(LogLevel::kTrace)) {
    trace(str(describe(record), " ends after ", milliseconds_of(took), " ms"));
  }
  return took;
}

void Logbook::fails(uint64_t flight, const Failure& failure) {
  recorder_->failed(flight, failure.message);
  if (log_enabled(LogLevel::kTrace)) trace("failed: " + failure.message);
  dump_once();
}

/// The number of a new message among those that go the same way. A receive from any rank gets it
/// when it has met its sender.
uint64_t Logbook::number_of(bool sends, int peer, uint32_t tag) {
  constexpr size_t kWays = 1 << 14;  // whoever uses so many tags does without
  if (ways_.size() >= kWays) ways_.clear();
  return ++ways_[{sends, peer, tag}];
}

MessageNote Logbook::message_given(bool sends, int peer, uint32_t tag, size_t bytes,
                                   std::chrono::milliseconds limit) {
  MessageNote note{0, sends, peer, tag, bytes, now_ns()};
  FlightEntry entry;
  entry.kind = sends ? FlightKind::kSend : FlightKind::kRecv;
  entry.sequence = peer < 0 ? 0 : number_of(sends, peer, tag);
  entry.created_ns = entry.started_ns = note.began_ns;
  entry.timeout_ms = limit.count();
  entry.input_elems = entry.output_elems = bytes;
  entry.peer = peer;
  entry.tag = tag;
  entry.group = group_;
  entry.state = FlightState::kStarted;
  entry.async = true;
  note.flight = recorder_->add(std::move(entry));
  if (log_enabled(LogLevel::kTrace)) trace(describe(note) + " starts");
  return note;
}

void Logbook::message_ended(const MessageNote& note, int peer) {
  const int64_t now = now_ns();
  if (note.peer < 0) recorder_->met(note.flight, peer, number_of(false, peer, note.tag));
  recorder_->completed(note.flight, now);
  if (log_enabled(LogLevel::kTrace)) {
    MessageNote met = note;
    met.peer = peer;
    trace(str(describe(met), " ends after ", milliseconds_of(now - note.began_ns), " ms"));
  }
}

void Logbook::message_failed(const MessageNote& note, const Failure& failure) {
  recorder_->failed(note.flight, failure.message);
  if (log_enabled(LogLevel::kTrace)) trace(describe(note) + " failed: " + failure.message);
}

void Logbook::closes(bool failed) {
  if (failed) dump_once();
}

void Logbook::dump_once() {
  if (!dumped_.exchange(true)) recorder_->dump_after_failure();
}

void Logbook::count(CommunicatorStats& stats) const {
  stats.exposed_wait_ns = exposed_wait_ns_->load();
  for (int i = 0; i < kCollectives; ++i) {
    const Counts counts = counters_[i].published.read();
    CollectiveStats& each = stats.collectives[i] = counts.totals;
    each.operations += device_counters_[i].operations.load();
    each.bytes += device_counters_[i].bytes.load();
    stats.operations += each.operations;
    stats.bytes += each.bytes;
    stats.wire_bytes += each.wire_bytes;
    stats.wait_ns += counts.wait_ns;
  }
}

void Logbook::trace(const std::string& text) const {
  log_line(LogLevel::kTrace, str("rank ", rank_, " of '", name_, "': ", text));
}

std::string algorithm_table(Collective collective, const CommunicatorOptions& options, int world) {
  const auto chosen = [&](size_t bytes) -> std::string {
    Operation operation;
    operation.collective = collective;
    operation.count = bytes / size_bytes(operation.dtype);
    try {
      const int algorithm = choose(operation, options, HostFacts{world, 0, Reach::kNone}).algorithm;
      return algorithm < 0 ? "" : kAlgorithms[algorithm].name;
    } catch (const Error&) {  // the wire format that is allowed does not go with it
      return "an error";
    }
  };
  constexpr size_t kLargest = size_t{1} << 40;
  std::string table = chosen(0), last = table;
  size_t same = 0;  // bytes for which `last` is the choice
  for (size_t bytes = 4; bytes <= kLargest; bytes *= 2) {
    if (const std::string next = chosen(bytes); next != last) {
      size_t low = same, high = bytes;  // the choice changes between these
      while (high - low > 4) {
        const size_t middle = (low + high) / 8 * 4;
        (chosen(middle) == last ? low : high) = middle;
      }
      table += str(" up to ", low, " B, then ", next);
      last = next;
    }
    same = bytes;
  }
  return table;
}

std::string group_line(const CommunicatorOptions& options, const Transport& transport) {
  const int world = transport.world();
  char host[256] = "";
  gethostname(host, sizeof(host) - 1);
  std::string table;
  for (int i = 0; i < kCollectives; ++i) {
    const auto collective = static_cast<Collective>(i);
    if (collective == Collective::kBarrier) continue;
    const std::string algorithms = algorithm_table(collective, options, world);
    if (algorithms.empty()) continue;
    table += str(table.empty() ? "" : "; ", name(collective), ": ", algorithms);
  }
  const LaneGeometry geometry = transport.geometry(0);
  return str("version ", DPCOMM_VERSION, ", group '", options.name, "': ", world,
             " ranks on 1 host (", host, "), transport ", options.transport, " with ",
             geometry.slots, " slots of ", geometry.slot_bytes, " bytes, wire ", name(options.wire),
             options.wire_on_all_links ? " on all links" : " between hosts", ", algorithm ",
             options.algorithm, " (", table, "), kernels ", name(best_isa()), ", timeout ",
             options.timeout.count() / 1000.0, " s");
}

}  // namespace dpcomm
