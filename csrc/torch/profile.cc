#include "torch/profile.h"

#include <c10/core/ScalarType.h>

#include <functional>
#include <string>
#include <torch/csrc/distributed/c10d/ParamCommsUtils.hpp>
#include <tuple>
#include <vector>

#include "comm/flight_recorder.h"

namespace dpcomm {
namespace {

struct Elements {
  int64_t in = 0;
  int64_t out = 0;
};

/// Elements of the tensors of a call on this rank, in and out, as torch counts them.
Elements elements_of(const Call& call, int rank, int world) {
  const auto each = static_cast<int64_t>(c10::elementSize(call.scalar_type()));
  Elements all;
  for (const Operation& operation : call.operations()) {
    const auto unit = static_cast<int64_t>(size_bytes(operation.dtype));
    const FlightEntry entry = flight_entry(operation, Choice{}, rank, world);
    all.in += static_cast<int64_t>(entry.input_elems) * unit / each;
    all.out += static_cast<int64_t>(entry.output_elems) * unit / each;
  }
  if (call.message()) {
    const auto elements = static_cast<int64_t>(call.message()->bytes) / each;
    (call.message()->is_send ? all.in : all.out) += elements;
  }
  return all;
}

/// Of an all-to-all of blocks of unequal size.
std::vector<int64_t> splits_of(const Call& call, std::vector<size_t> Operation::* counts) {
  if (call.operations().size() != 1) return {};
  const Operation& operation = call.operations()[0];
  return {(operation.*counts).begin(), (operation.*counts).end()};
}

/// The step from one rank of the group to the next; -1 where it is not always the same.
int stride_of(const std::vector<int>& ranks) {
  if (ranks.size() < 2) return 1;
  const int stride = ranks[1] - ranks[0];
  for (size_t i = 1; i < ranks.size(); ++i) {
    if (ranks[i] - ranks[i - 1] != stride) return -1;
  }
  return stride;
}

}  // namespace

void record_call(const c10d::Backend& group, const Call& call, uint64_t sequence,
                 const std::vector<int>& global_ranks, const std::function<void()>& body) {
  const Elements elements = elements_of(call, group.getRank(), group.getSize());
  const std::vector<int64_t> in_splits = splits_of(call, &Operation::counts);
  const std::vector<int64_t> out_splits = splits_of(call, &Operation::recv_counts);
  const std::string name = call.title() + sizeof("dpcomm:") - 1;
  RECORD_PARAM_COMMS_DATA_WITH_ASYNC_OP(
      std::make_tuple(static_cast<int64_t>(sequence), false),
      std::make_tuple(group.getGroupUid(), group.getGroupDesc()), call.results(), call.results(),
      group.getRank(), std::string(name), elements.in, elements.out, call.scalar_type(), in_splits,
      out_splits, global_ranks.empty() ? 0 : global_ranks[0], stride_of(global_ranks),
      group.getSize(), call.async());
  body();
}

}  // namespace dpcomm
