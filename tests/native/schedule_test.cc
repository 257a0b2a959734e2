// Schedules, plans and proofs, for the sanitizers: the full matrix is in tests/schedule.
#include <algorithm>

#include "base/error.h"
#include "check.h"
#include "schedule/registry.h"
#include "verify/mutate.h"
#include "verify/prove.h"

namespace dpcomm {
namespace {

// Generators and their limits work at compile time, so they need no memory and no library.
constexpr ScheduleParams kFourRanks{0, 4, 0, 2};
static_assert(RingAllReduce::min_slots(kFourRanks) == 3);
static_assert(TwoShotAllReduce::min_slots(kFourRanks) == 2);
static_assert(DoubleTreeAllReduce::roundings(kFourRanks) == 3);
static_assert(binomial_depth(8) == 3 && binomial_depth(9) == 3 && binomial_depth(16) == 4);
static_assert(channel_lanes() == 5);

int min_slots(const PlannedOperation& operation, int world) {
  return kAlgorithms[operation.algorithm].min_slots(params_of(operation, 0, world));
}

TEST(every_algorithm_is_proved) {
  const int largest = check::long_run() ? 65 : 17;
  for (int algorithm = 0; algorithm < kAlgorithmCount; ++algorithm) {
    for (int world = 1; world <= largest; ++world) {
      const PlannedOperation operation{algorithm, world / 2, 1 + world % 3, 2};
      const Plan plan = make_plan(world, {operation});
      const Proof proof = prove(plan, ProofOptions{min_slots(operation, world)});
      CHECK_EQ(proof.error, std::string());
      CHECK(proof.holds);
    }
  }
}

TEST(every_fault_is_seen) {
  for (int algorithm = 0; algorithm < kAlgorithmCount; ++algorithm) {
    for (int kind = 0; kind < kMutations; ++kind) {
      for (int world : {2, 3, 4, 7}) {
        for (bool check_form : {true, false}) {
          const PlannedOperation operation{algorithm, 0, 2, 2};
          Plan plan = make_plan(world, {operation});
          if (!mutate(plan, static_cast<Mutation>(kind), check::seed() + world)) continue;
          CHECK(!prove(plan, ProofOptions{min_slots(operation, world), true, check_form}).holds);
        }
      }
    }
  }
}

TEST(two_operations_on_the_same_channels) {
  for (int first = 0; first < kAlgorithmCount; ++first) {
    for (int second = 0; second < kAlgorithmCount; ++second) {
      const PlannedOperation a{first, 0, 1, 2};
      const PlannedOperation b{second, 4, 2, 1};
      const int slots = std::max(min_slots(a, 5), min_slots(b, 5));
      CHECK_EQ(prove(make_plan(5, {a, b}), ProofOptions{slots}).error, std::string());
    }
  }
}

TEST(numbers_that_make_no_sense) {
  CHECK_THROWS(Error, make_plan(0, {PlannedOperation{}}));
  CHECK_THROWS(Error, (make_plan(4, {PlannedOperation{kAlgorithmCount, 0, 1, 1}})));
  CHECK_THROWS(Error, (make_plan(4, {PlannedOperation{0, 4, 1, 1}})));
  CHECK_THROWS(Error, (make_plan(4, {PlannedOperation{0, 0, 0, 1}})));
}

}  // namespace
}  // namespace dpcomm
