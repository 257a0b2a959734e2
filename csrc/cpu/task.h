// An operation as those who run it need it.
#pragma once

#include <chrono>
#include <cstddef>
#include <functional>
#include <vector>

#include "base/clock.h"
#include "base/dtype.h"
#include "base/reduce_op.h"
#include "schedule/collective.h"
#include "transport/channel.h"
#include "wire/wire_format.h"

namespace dpcomm {

/// Checked, and with algorithm and wire format chosen.
struct Task {
  OpRecord record;       ///< says which operation, for tags and messages
  uint32_t tag = 0;      ///< fingerprint of the record
  uint32_t history = 0;  ///< of the operations before this one
  const std::byte* input = nullptr;
  std::byte* output = nullptr;
  Collective collective = Collective::kAllReduce;
  size_t count = 0;
  std::vector<size_t> counts;       ///< as in Operation, unless all blocks are of `count` elements
  std::vector<size_t> recv_counts;  ///< of an all-to-all with `counts`
  Dtype dtype = Dtype::kFloat32;
  ReduceOp op = ReduceOp::kSum;
  double factor = 1;
  int root = 0;
  WireFormat wire = WireFormat::kNative;
  int algorithm = 0;     ///< index into kAlgorithms
  bool patient = false;  ///< it runs beside other work of this process (WaitPolicy)
  Clock::time_point deadline;
  std::chrono::milliseconds limit{0};  ///< what the deadline came from, for messages
  /// Asked now and then by a wait that lasts, in the thread of run(); true ends it.
  const std::function<bool()>* interrupted = nullptr;
};

}  // namespace dpcomm
