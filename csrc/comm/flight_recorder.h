// The last operations of a rank, kept for when something goes wrong.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "base/dtype.h"
#include "base/reduce_op.h"
#include "comm/tuner.h"
#include "schedule/collective.h"
#include "wire/wire_format.h"

namespace dpcomm {

enum class FlightKind : uint8_t { kCollective, kSend, kRecv };
enum class FlightState : uint8_t { kScheduled, kStarted, kCompleted };

constexpr const char* name(FlightState state) {
  constexpr const char* kNames[] = {"scheduled", "started", "completed"};
  return kNames[static_cast<int>(state)];
}

/// One operation or message. Times are now_ns(), 0 as long as it has not come so far.
struct FlightEntry {
  uint64_t id = 0;        ///< number in its recorder, from 1
  uint64_t sequence = 0;  ///< collective: number in its group and place, from 1; message: how many
                          ///< have gone this way (from, to, tag), this one included
  int64_t created_ns = 0;
  int64_t started_ns = 0;
  int64_t completed_ns = 0;
  int64_t timeout_ms = 0;
  uint64_t input_elems = 0;   ///< of this rank's input
  uint64_t output_elems = 0;  ///< of this rank's output
  uint64_t total_elems = 0;   ///< of all blocks together, where they are not of equal size
  int32_t peer = 0;           ///< root of a collective that has one; the other rank of a message
  uint32_t tag = 0;           ///< of a message
  uint32_t group = 0;         ///< index into FlightRecorder::groups()
  FlightKind kind = FlightKind::kCollective;
  Collective collective = Collective::kAllReduce;
  Dtype dtype = Dtype::kUint8;
  ReduceOp op = ReduceOp::kSum;
  WireFormat wire = WireFormat::kNative;
  uint8_t algorithm = 0;  ///< index into kAlgorithms
  FlightState state = FlightState::kScheduled;
  bool async = false;
  bool uneven = false;     ///< blocks of unequal size
  bool on_device = false;  ///< times are when the host saw it; in a graph it stays kScheduled
  std::string error;       ///< what it ended with, if not well
};

/// "all_reduce", "send".
const char* name(const FlightEntry& entry);

/// The entry of an operation that was given just now: what is known of it before it runs.
FlightEntry flight_entry(const Operation& operation, const Choice& choice, int rank, int world);

struct FlightGroup {
  std::string name;
  int rank = 0;                   ///< this process's in the group
  std::vector<int> global_ranks;  ///< of every rank of the group
};

/// A ring of the last entries of all groups of one rank. Its memory is taken once; a record costs a
/// lock that is free as a rule and a copy. Members may be called from any thread.
class FlightRecorder {
 public:
  /// The recorder of a rank (among all of the job) in this process; made, for as many entries as
  /// DPCOMM_FLIGHT_RECORDER_SIZE says, when it is asked for first. Kept until the process ends.
  static std::shared_ptr<FlightRecorder> of(int global_rank);
  /// All recorders of this process: one, unless several ranks are threads of it.
  static std::vector<std::shared_ptr<FlightRecorder>> all();
  /// Where another copy of this library in the process (dpcomm._core, dpcomm._torch) finds the
  /// recorders, so that both have the same.
  static void* registry();
  static void share(void* registry);

  FlightRecorder(int global_rank, size_t size, std::string dump_prefix);

  int global_rank() const { return global_rank_; }
  uint32_t add_group(FlightGroup group);
  /// Returns the entry's id; 0 if nothing is recorded.
  uint64_t add(FlightEntry entry);

  // Of an entry that may have been overwritten meanwhile, or of 0: then nothing happens.
  void started(uint64_t id, int64_t now);
  void completed(uint64_t id, int64_t now);
  void failed(uint64_t id, const std::string& error);
  /// Of a receive from any rank.
  void met(uint64_t id, int peer, uint64_t sequence);

  /// Oldest first.
  std::vector<FlightEntry> entries() const;
  std::vector<FlightGroup> groups() const;

  /// Writes what torch's `torchfrtrace` reads (flight_dump.cc) to "<prefix><global rank>" and
  /// returns that name. Throws UsageError if the file cannot be written.
  std::string dump(const std::string& prefix) const;
  /// The same to DPCOMM_FLIGHT_RECORDER_DUMP, if that is set; what goes wrong is a warning.
  void dump_after_failure() const;

 private:
  FlightEntry* find(uint64_t id);

  const int global_rank_;
  const std::string dump_prefix_;
  mutable std::mutex mutex_;
  std::vector<FlightEntry> ring_;  // entry n is at (n - 1) % size
  uint64_t last_ = 0;
  std::vector<FlightGroup> groups_;
};

}  // namespace dpcomm
