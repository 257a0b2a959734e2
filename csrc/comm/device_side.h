// A communicator's operations on a device: one engine, the order of its operations, and a thread
// that watches them.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "base/clock.h"
#include "comm/communicator.h"
#include "comm/logbook.h"
#include "comm/tuner.h"
#include "cpu/diagnosis.h"
#include "cuda/engine.h"
#include "transport/channel.h"

namespace dpcomm {

/// Moves as many bytes from every rank to every rank, by rank. Collective; throws as a collective
/// does.
using ExchangeBytes = std::function<std::string(const std::string& own)>;

class DeviceSide {
 public:
  /// Makes the engine with the other ranks. Throws UsageError on all ranks if it cannot be made on
  /// one of them; the communicator stays usable.
  DeviceSide(std::shared_ptr<Transport> transport, std::shared_ptr<Logbook> log, int device,
             void* stream, const std::string& name, const ExchangeBytes& exchange);
  /// close()
  ~DeviceSide();
  DeviceSide(const DeviceSide&) = delete;
  DeviceSide& operator=(const DeviceSide&) = delete;

  int device() const { return device_; }
  const StagingGeometry& geometry() const { return geometry_; }

  uint64_t enqueue(const Operation& operation, const Choice& choice, void* caller,
                   std::chrono::milliseconds limit);
  void join(uint64_t ticket, void* caller);
  bool complete(uint64_t ticket);
  /// Once closed: what the operations that were not complete ended with.
  std::optional<Failure> failure();

  /// Ends what is in flight. The staging stays until no peer can write to it any more: then the
  /// next communicator that opens or closes a device frees it. Idempotent.
  void close();

 private:
  struct Flying {
    uint64_t ticket = 0;
    OpRecord record;
    std::chrono::milliseconds limit{0};
    uint64_t flight = 0;  ///< in the flight recorder
    bool begun = false;
    Clock::time_point since;  ///< it could run
  };
  /// A wait of a kernel that lasts.
  struct Waiting {
    WaitRecord record;
    Clock::time_point since;
  };

  void make(void* stream, const std::string& name, const ExchangeBytes& exchange);
  std::shared_ptr<DeviceEngine> engine();
  std::optional<Flying> first();
  void announce(const OpRecord& record);
  void wait_for_end(std::chrono::milliseconds limit);
  void stop_watching();
  void note_unfinished();

  // The watchdog (device_watch.cc).
  void watch();
  void tick();
  void advance();
  void note_failure(const Failure& own);
  void look_at_waits();
  void look_for_disagreement(const DeviceEngine& engine) const;
  void check();
  void check_graphs();
  void show(Stage stage);
  std::chrono::milliseconds limit_of(const WaitRecord& record);
  OpRecord operation_of(const WaitRecord& record) const;
  [[noreturn]] void throw_disagreement(const WaitRecord& record) const;
  [[noreturn]] void throw_timeout(const OpRecord& operation, std::chrono::milliseconds limit) const;
  std::string waits_text(const OpRecord& operation) const;

  const std::shared_ptr<Transport> transport_;
  const std::shared_ptr<Logbook> log_;
  const Diagnosis diagnosis_;
  const int device_;
  StagingGeometry geometry_;

  std::mutex order_;  // sequence numbers, launches; a launch may block
  OpRecord last_;     // the operation that was given last

  std::mutex mutex_;  // what follows
  std::condition_variable changed_;
  std::shared_ptr<DeviceEngine> engine_;  // null once closed
  std::deque<Flying> flying_;
  OpRecord shown_;                            // the record that the other ranks see
  std::chrono::milliseconds graph_limit_{0};  // not 0: graphs have operations
  std::optional<Failure> unfinished_;
  bool closing_ = false;
  bool stopping_ = false;
  std::thread thread_;

  // Of the watchdog.
  std::vector<Waiting> waiting_;
  bool peers_missing_ = false;  // when it looked last
};

}  // namespace dpcomm
