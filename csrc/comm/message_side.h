// A communicator's messages between two ranks: their thread, their handles, their errors.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>

#include "comm/logbook.h"
#include "comm/work.h"
#include "cpu/messenger.h"
#include "cpu/progress.h"
#include "transport/channel.h"

namespace dpcomm {

/// All members may be called from any thread. Owned by a shared_ptr, which its thread holds, too.
class MessageSide : public std::enable_shared_from_this<MessageSide> {
 public:
  MessageSide(std::shared_ptr<Transport> transport, const WaitPolicy& policy,
              std::shared_ptr<Logbook> log);

  /// Begins a send or, to `data`, a receive, in this thread as far as that needs no waiting; the
  /// rest is done by the messages' own thread, which the first call starts. Throws UsageError for
  /// arguments that make no sense, or once closed.
  std::shared_ptr<Work> post(bool sends, int peer, uint32_t tag, void* data, size_t bytes,
                             std::chrono::milliseconds limit);
  /// Ends all messages with an error. Waits for nobody; idempotent.
  void close();
  /// Communicator::about_to_block(), of this thread's messages.
  static void about_to_block();

  uint64_t messages() const { return messages_.load(); }
  uint64_t bytes() const { return bytes_.load(); }
  uint64_t wire_bytes() const { return wire_bytes_.load(); }

 private:
  struct Item final : Transfer {
    std::shared_ptr<Work> work = std::make_shared<Work>();
    std::optional<Failure> error;
    MessageNote note;
  };

  void check_arguments(bool sends, int peer, const void* data, size_t bytes) const;
  void start_thread();
  void hand_over();
  void run();
  bool turn(bool check);
  bool complete_finished(Waiter& waiter);
  void let_others_in() const;
  [[noreturn]] void leave();
  void end(Failure failure);
  void count(const Item& item);

  const std::shared_ptr<Transport> transport_;
  const std::shared_ptr<Logbook> log_;
  const WaitPolicy busy_policy_, patient_policy_;
  std::atomic<int> posting_{0};  // threads that want the mutex for a post
  std::atomic<uint64_t> messages_{0}, bytes_{0}, wire_bytes_{0};

  std::mutex mutex_;  // what follows
  Messenger messenger_;
  std::deque<std::shared_ptr<Item>> complete_;  // their works are still to be told
  std::optional<Failure> failure_;              // nothing moves any more
  bool closed_ = false;
  bool idle_ = true;  // the thread may sleep for long
  std::thread thread_;
  /// The side whose thread this is, while it runs the callbacks of a work.
  static thread_local MessageSide* completing_;
};

}  // namespace dpcomm
