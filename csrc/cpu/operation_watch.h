// Why an operation on the CPU waits so long: asked now and then by whoever runs it.
#pragma once

#include <atomic>
#include <functional>
#include <vector>

#include "cpu/diagnosis.h"
#include "cpu/task.h"
#include "transport/channel.h"

namespace dpcomm {

class OperationWatch {
 public:
  /// `interrupted`, once set, ends the operation with a PeerError.
  OperationWatch(Transport& transport, const std::atomic<bool>& interrupted)
      : transport_(transport), diagnosis_(transport, Place::kHost), interrupted_(interrupted) {}

  /// Shows that this rank lives, and throws if the operation cannot or may not go on: PeerError,
  /// TimeoutError, or UsageError where the ranks disagree. `silent` gives the ranks from which
  /// something is awaited; asked only for a message.
  void look(const Task& task, const std::function<std::vector<int>()>& silent);
  void check_disagreement(const Task& task) const { diagnosis_.check_disagreement(task.record); }

 private:
  [[noreturn]] void throw_timeout(const Task& task, const std::vector<int>& silent) const;

  Transport& transport_;
  const Diagnosis diagnosis_;
  const std::atomic<bool>& interrupted_;
};

}  // namespace dpcomm
