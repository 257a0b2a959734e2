// Schedules for tools and tests: the list of algorithms, plans step by step, proofs, partitions.
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "base/error.h"
#include "bind/core_bindings.h"
#include "verify/mutate.h"
#include "verify/plan.h"
#include "verify/prove.h"

namespace dpcomm {
namespace {

namespace py = pybind11;

/// collective, algorithm, root, slices, rounds, rounds of each block or nothing
using OperationTuple = std::tuple<std::string, std::string, int, int, int, std::vector<int>>;

PlannedOperation operation_of(const OperationTuple& tuple) {
  const auto& [collective, algorithm, root, slices, rounds, block_rounds] = tuple;
  PlannedOperation operation;
  operation.algorithm = -1;
  for (int i = 0; i < kCollectives; ++i) {
    if (collective != name(static_cast<Collective>(i))) continue;
    operation.algorithm = find_algorithm(static_cast<Collective>(i), algorithm);
  }
  if (operation.algorithm < 0) {
    throw usage_error("there is no algorithm ", algorithm, " for ", collective);
  }
  operation.root = root;
  operation.slices = slices;
  operation.rounds = rounds;
  operation.block_rounds = block_rounds;
  return operation;
}

/// collective, name, lanes, first_lane, channel_lanes, whether kernels run it
using AlgorithmTuple = std::tuple<std::string, std::string, int, int, int, bool>;

std::vector<AlgorithmTuple> list_algorithms() {
  std::vector<AlgorithmTuple> list;
  for (const AlgorithmInfo& info : kAlgorithms) {
    list.emplace_back(name(info.collective), info.name, info.lanes, info.first_lane,
                      info.channel_lanes, !is_host_only(info.collective));
  }
  return list;
}

/// (chunks, min_slots, roundings).
std::tuple<int, int, int> limits(const std::string& collective, const std::string& algorithm,
                                 int world, int slices) {
  const PlannedOperation operation = operation_of({collective, algorithm, 0, slices, 1, {}});
  if (world < 1 || slices < 1) {
    throw usage_error("world_size ", world, " with ", slices, " slices makes no sense");
  }
  const ScheduleParams params = params_of(operation, 0, world);
  const AlgorithmInfo& info = kAlgorithms[operation.algorithm];
  return {info.chunks(params), info.min_slots(params), info.roundings(params)};
}

py::tuple as_tuple(const Peers& peers) {
  py::tuple tuple(peers.count());
  for (int i = 0; i < peers.count(); ++i) tuple[i] = peers[i];
  return tuple;
}

/// (rank, lane, round, chunk, slice, primitive, recv_lane, recv_peers, send_lane, send_peers,
/// own_as_sent) of every step, by rank, then lane, then in order.
py::list write_plan(int world, const OperationTuple& tuple) {
  const Plan plan = make_plan(world, {operation_of(tuple)});
  const Phase& phase = plan.phases[0];
  py::list steps;
  for (int rank = 0; rank < world; ++rank) {
    for (int lane = 0; lane < phase.lanes; ++lane) {
      for (const PlannedStep& planned : phase.stream(rank, lane)) {
        const Step& step = planned.step;
        steps.append(py::make_tuple(rank, lane, planned.round, step.chunk, step.slice,
                                    int{step.primitive}, int{step.recv_lane},
                                    as_tuple(step.recv_peers), int{step.send_lane},
                                    as_tuple(step.send_peers), step.own_as_sent));
      }
    }
  }
  return steps;
}

/// (holds, error, steps, messages, roundings) of a proof.
using ProofTuple = std::tuple<bool, std::string, int64_t, int64_t, int>;

/// A proof of the operations one after the other; with a mutation, of the plan with that fault in
/// it, or nothing if it has no place for one.
std::optional<ProofTuple> prove_plan(int world, const std::vector<OperationTuple>& tuples,
                                     int slots, bool keep_as_sent, bool check_form,
                                     const std::string& mutation, uint64_t seed) {
  std::vector<PlannedOperation> operations;
  for (const OperationTuple& tuple : tuples) operations.push_back(operation_of(tuple));
  int wanted = -1;
  for (int i = 0; i < kMutations; ++i) {
    if (mutation == name(static_cast<Mutation>(i))) wanted = i;
  }
  if (wanted < 0 && !mutation.empty()) throw usage_error("unknown mutation ", mutation);
  py::gil_scoped_release release;
  Plan plan = make_plan(world, operations);
  if (wanted >= 0 && !mutate(plan, static_cast<Mutation>(wanted), seed)) return std::nullopt;
  const Proof proof = prove(plan, ProofOptions{slots, keep_as_sent, check_form});
  return ProofTuple{proof.holds, proof.error, proof.steps, proof.messages, proof.roundings};
}

std::vector<std::string> list_mutations() {
  std::vector<std::string> list;
  for (int i = 0; i < kMutations; ++i) list.emplace_back(name(static_cast<Mutation>(i)));
  return list;
}

/// count, chunks, slices, slot_elems, grain, blocked
using PartitionTuple = std::tuple<size_t, int, int, size_t, size_t, bool>;

Partition partition_of(const PartitionTuple& tuple) {
  const auto& [count, chunks, slices, slot_elems, grain, blocked] = tuple;
  if (chunks < 1 || slices < 1 || grain < 1 || slot_elems < grain || slot_elems % grain != 0) {
    throw usage_error("a partition needs chunks and slices, and slots of a multiple of the grain");
  }
  return Partition(count, chunks, slices, slot_elems, grain, blocked);
}

std::tuple<size_t, size_t> partition_slice(const PartitionTuple& tuple, size_t round, int chunk,
                                           int slice) {
  const Range range = partition_of(tuple).slice(round, chunk, slice);
  return {range.first, range.count};
}

}  // namespace

void bind_schedule(py::module_& module) {
  module.def("schedule_algorithms", &list_algorithms);
  module.def("schedule_limits", &limits, py::arg("collective"), py::arg("algorithm"),
             py::arg("world"), py::arg("slices"));
  module.def("schedule_plan", &write_plan, py::arg("world"), py::arg("operation"));
  module.def("schedule_prove", &prove_plan, py::arg("world"), py::arg("operations"),
             py::arg("slots"), py::arg("keep_as_sent"), py::arg("check_form"), py::arg("mutation"),
             py::arg("seed"));
  module.def("schedule_mutations", &list_mutations);
  module.def(
      "partition_rounds",
      [](const PartitionTuple& partition) { return partition_of(partition).rounds(); },
      py::arg("partition"));
  module.def("partition_slice", &partition_slice, py::arg("partition"), py::arg("round"),
             py::arg("chunk"), py::arg("slice"));
}

}  // namespace dpcomm
