#include "cpu/operation_watch.h"

#include "base/error.h"

namespace dpcomm {

void OperationWatch::look(const Task& task, const std::function<std::vector<int>()>& silent) {
  if (const auto failure = transport_.failure()) throw Error(failure->kind, failure->message);
  const int rank = transport_.rank();
  if (interrupted_.load()) diagnosis_.leave(task.record);
  if (task.interrupted != nullptr && *task.interrupted && (*task.interrupted)()) {
    throw peer_error(transport_.describe(rank), " was interrupted in ", describe(task.record));
  }
  OpRecord record = task.record;
  record.alive_ns = now_ns();
  transport_.announce(record);
  diagnosis_.check_disagreement(task.record);
  diagnosis_.check_peers(task.record);
  if (Clock::now() > task.deadline) throw_timeout(task, silent());
}

void OperationWatch::throw_timeout(const Task& task, const std::vector<int>& silent) const {
  std::string reason = diagnosis_.not_called(task.record);
  if (reason.empty()) {
    reason = diagnosis_.not_moving(task.record);
    std::vector<std::string> names;
    for (const int peer : silent) names.push_back(transport_.describe(peer));
    if (reason.empty()) reason = "nothing came from " + joined(names, ", ");
    reason = "every rank has called it, but " + reason;
  }
  throw timeout_error(describe(task.record), " was not complete after ",
                      task.limit.count() / 1000.0, " s on ", transport_.describe(transport_.rank()),
                      ": ", reason, diagnosis_.report(task.record));
}

}  // namespace dpcomm
