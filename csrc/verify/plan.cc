#include "verify/plan.h"

#include "base/error.h"

namespace dpcomm {
namespace {

template <class Schedule>
Phase write_out(int world, const PlannedOperation& operation) {
  Phase phase;
  phase.operation = operation;
  phase.lanes = Schedule::kLanes;
  phase.chunks = Schedule::chunks(params_of(operation, 0, world));
  phase.streams.resize(static_cast<size_t>(world) * phase.lanes);
  for (int rank = 0; rank < world; ++rank) {
    for (int lane = 0; lane < phase.lanes; ++lane) {
      std::vector<PlannedStep>& stream = phase.stream(rank, lane);
      for (int round = 0; round < operation.rounds; ++round) {
        Schedule schedule(params_of(operation, rank, world), lane);
        PlannedStep planned;
        planned.round = round;
        while (schedule.next(planned.step)) {
          if (operation.has(round, planned.step.chunk)) stream.push_back(planned);
        }
      }
    }
  }
  return phase;
}

void check(int world, const PlannedOperation& operation) {
  if (operation.algorithm < 0 || operation.algorithm >= kAlgorithmCount) {
    throw usage_error("algorithm ", operation.algorithm, " does not exist");
  }
  if (operation.root < 0 || operation.root >= world) {
    throw usage_error("root ", operation.root, " is not a rank of ", world);
  }
  const AlgorithmInfo& info = kAlgorithms[operation.algorithm];
  const auto chunks = static_cast<size_t>(info.chunks(params_of(operation, 0, world)));
  if (!operation.block_rounds.empty() &&
      (!has_blocks(info.collective) || operation.block_rounds.size() != chunks)) {
    throw usage_error("rounds of ", operation.block_rounds.size(), " blocks for ", chunks,
                      " chunks of ", name(info.collective));
  }
  if (operation.slices < 1 || operation.rounds < 0) {
    throw usage_error("a plan needs at least 1 slice and 0 rounds, not ", operation.slices, " and ",
                      operation.rounds);
  }
}

}  // namespace

ScheduleParams params_of(const PlannedOperation& operation, int rank, int world) {
  ScheduleParams params;
  params.rank = rank;
  params.world = world;
  params.root = operation.root;
  params.slices = operation.slices;
  return params;
}

Plan make_plan(int world, const std::vector<PlannedOperation>& operations) {
  if (world < 1) throw usage_error("a plan needs at least 1 rank, not ", world);
  Plan plan;
  plan.world = world;
  for (const PlannedOperation& operation : operations) {
    check(world, operation);
    plan.phases.push_back(visit_schedule(operation.algorithm, [&](auto type) {
      return write_out<typename decltype(type)::type>(world, operation);
    }));
  }
  return plan;
}

std::string primitive_name(uint8_t primitive) {
  constexpr const char* kNames[] = {"RECV", "REDUCE", "COPY", "SEND"};
  std::string text;
  for (int bit = 0; bit < 4; ++bit) {
    if (!(primitive >> bit & 1)) continue;
    if (!text.empty()) text += '|';
    text += kNames[bit];
  }
  return text;
}

}  // namespace dpcomm
