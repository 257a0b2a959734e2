// What a communicator notes of its operations: flight recorder, counts, lines of DPCOMM_DEBUG.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <tuple>

#include "comm/communicator.h"
#include "comm/flight_recorder.h"
#include "comm/tuner.h"
#include "transport/channel.h"
#include "transport/slot_ring.h"

namespace dpcomm {

/// Which message a note is about.
struct MessageNote {
  uint64_t flight = 0;  ///< in the flight recorder
  bool sends = false;
  int peer = 0;  ///< -1: any
  uint32_t tag = 0;
  size_t bytes = 0;
  int64_t began_ns = 0;
};

/// How an operation gets its place in the order.
enum class Given : uint8_t {
  kStarts,  ///< in run(), which starts it at once
  kFails,   ///< in run(), after the communicator has failed
  kWaits,   ///< in submit(), for its turn
};

/// given() is for one thread at a time; so are begins(), ends() and fails(), and so is what is
/// about messages; the rest for any.
class Logbook {
 public:
  Logbook(int rank, int world, const CommunicatorOptions& options);

  /// What an operation took.
  struct Cost {
    uint64_t bytes = 0;       ///< of its tensors
    uint64_t wire_bytes = 0;  ///< that this rank sent
    uint64_t wait_ns = 0;     ///< without a step to do
  };

  /// An operation has got its place in the order, at `now` (now_ns()). Returns its number in the
  /// flight recorder.
  uint64_t given(const Operation& operation, const Choice& choice, std::chrono::milliseconds limit,
                 int64_t now, Given how);
  /// An operation has been given to the device. What follows on its way is what the host sees of
  /// it, some time after it happened; of an operation in a graph it sees nothing.
  uint64_t given_to_device(const Operation& operation, const Choice& choice, uint64_t sequence,
                           std::chrono::milliseconds limit);
  void device_begins(uint64_t flight);
  void device_ends(uint64_t flight);
  void device_fails(uint64_t flight, const Failure& failure);
  /// It runs: every rank can see it in the transport. `flight` is 0 where given() said that it
  /// starts.
  void begins(uint64_t flight, const OpRecord& record);
  /// It is complete. Returns how long it took, in nanoseconds.
  int64_t ends(uint64_t flight, const OpRecord& record, const Cost& cost);
  /// It ended, or will never begin, with an error that has ended the communicator.
  void fails(uint64_t flight, const Failure& failure);

  MessageNote message_given(bool sends, int peer, uint32_t tag, size_t bytes,
                            std::chrono::milliseconds limit);
  void message_ended(const MessageNote& note, int peer);
  void message_failed(const MessageNote& note, const Failure& failure);

  /// An error has ended the communicator.
  void failed() { dump_once(); }
  /// The communicator is closed, after an error or without.
  void closes(bool failed);

  /// A caller waited so long, in run().
  void waited(int64_t ns) { exposed_wait_ns_->fetch_add(static_cast<uint64_t>(ns)); }
  /// Where the waits for a work add to that.
  const std::shared_ptr<std::atomic<uint64_t>>& exposed_wait_ns() const { return exposed_wait_ns_; }
  /// Fills in what is counted here.
  void count(CommunicatorStats& stats) const;

  FlightRecorder& recorder() { return *recorder_; }
  uint32_t group() const { return group_; }

 private:
  /// Of operations on the CPU. One thread at a time counts, so it costs no atomic operation; any
  /// thread reads what was published.
  struct Counts {
    CollectiveStats totals;
    uint64_t wait_ns = 0;
  };
  struct Counter {
    Counts counts;
    Published<Counts> published;
  };
  /// Of operations given to a device.
  struct DeviceCounter {
    std::atomic<uint64_t> operations{0}, bytes{0};
  };

  void trace(const std::string& text) const;
  void dump_once();
  uint64_t number_of(bool sends, int peer, uint32_t tag);

  const int rank_;
  const int world_;
  const std::string name_;
  std::shared_ptr<FlightRecorder> recorder_;
  uint32_t group_ = 0;
  uint64_t given_ = 0;
  int64_t began_ns_ = 0;
  std::map<std::tuple<bool, int, uint32_t>, uint64_t> ways_;  // messages by direction, peer, tag
  std::atomic<bool> dumped_{false};
  std::array<Counter, kCollectives> counters_;
  std::array<DeviceCounter, kCollectives> device_counters_;
  const std::shared_ptr<std::atomic<uint64_t>> exposed_wait_ns_;
};

/// "one_shot up to 32768 B, then two_shot": what auto, or the algorithm that was chosen, comes to
/// for a collective on `world` ranks of one host, by bytes of a rank's float32 tensor (or block).
/// Empty if the collective has no algorithm.
std::string algorithm_table(Collective collective, const CommunicatorOptions& options, int world);

/// The line of DPCOMM_DEBUG=INFO for a new group.
std::string group_line(const CommunicatorOptions& options, const Transport& transport);

}  // namespace dpcomm
