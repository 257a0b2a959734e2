// What torch's profiler sees of a call.
#pragma once

#include <ATen/record_function.h>

#include <functional>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <vector>

#include "torch/call.h"

namespace dpcomm {

/// Runs `body` within an event of torch's profiler, record_param_comms, that has the name,
/// elements, dtype and group of the call, as those of torch's own backends have.
void record_call(const c10d::Backend& group, const Call& call, uint64_t sequence,
                 const std::vector<int>& global_ranks, const std::function<void()>& body);

/// Runs `body`, which starts the call, or all of it where it is synchronous, and shows it to the
/// profiler if one runs. `body` itself adds the event "dpcomm:<collective>", which is as long as
/// the operation. Where no profiler runs, this costs one look at its callbacks.
template <class Body>
auto with_profile(const c10d::Backend& group, const Call& call, uint64_t sequence,
                  const std::vector<int>& global_ranks, Body&& body) {
  if (!at::hasCallbacks()) return body();
  decltype(body()) result;
  record_call(group, call, sequence, global_ranks, [&] { result = body(); });
  return result;
}

}  // namespace dpcomm
