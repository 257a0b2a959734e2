// Every collective by every algorithm over inproc, for the sanitizers: rounds, wire formats,
// dtypes, roots, in place and not, back to back, with and without a transport that stalls.
#include <cstdlib>

#include "group.h"

namespace dpcomm {
namespace {

constexpr size_t kSmallSlot = 4096;  // the smallest: many rounds for few elements

/// Counts around the edges of slots and rounds for elements of `elem` bytes.
std::vector<size_t> counts(size_t elem, int world, int salt) {
  const size_t slot = kSmallSlot / elem;
  const std::vector<size_t> all = {0,
                                   1,
                                   static_cast<size_t>(world),
                                   63,
                                   513,
                                   slot - 1,
                                   slot + 1,
                                   2 * slot * world + 5,
                                   4 * slot * world + 65,
                                   7 * slot};
  if (check::long_run()) return all;
  return {all[salt % all.size()], all[(salt + 3) % all.size()], all[(salt + 7) % all.size()]};
}

void run_and_check(Communicator& communicator, Operation operation, int salt) {
  const int world = communicator.world();
  operation.root = salt % world;
  Trial trial(operation, communicator.rank(), world, salt, salt % 2 == 0);
  communicator.run(trial.operation());
  trial.check();
}

/// Everything that a rank does; all ranks draw the same salts.
void run_everything(Communicator& communicator) {
  constexpr Dtype kTypes[] = {Dtype::kFloat32, Dtype::kBFloat16, Dtype::kInt8, Dtype::kFloat64,
                              Dtype::kInt64};
  constexpr ReduceOp kOps[] = {ReduceOp::kSum, ReduceOp::kMax, ReduceOp::kSum, ReduceOp::kProduct};
  int salt = static_cast<int>(check::seed() % 1000);
  for (Operation operation : every_algorithm()) {
    operation.dtype = kTypes[salt % 5];
    operation.op = reduces(operation.collective) ? kOps[salt % 4] : ReduceOp::kSum;
    for (size_t count : counts(size_bytes(operation.dtype), communicator.world(), salt)) {
      operation.count = count;
      run_and_check(communicator, operation, ++salt);
    }
    if (!reduces(operation.collective)) continue;
    operation.dtype = salt % 2 == 0 ? Dtype::kFloat32 : Dtype::kBFloat16;
    operation.op = ReduceOp::kSum;
    operation.wire = salt % 2 == 0 ? WireFormat::kFp16 : WireFormat::kBf16;
    operation.count = 16384 + salt % 300;  // smaller messages go native
    run_and_check(communicator, operation, ++salt);
    Operation barrier;
    barrier.collective = Collective::kBarrier;
    communicator.run(barrier);
  }
  Operation int8;
  int8.wire = WireFormat::kInt8;
  int8.algorithm = "two_shot";
  int8.count = 9001;
  run_and_check(communicator, int8, ++salt);
}

void run_worlds(int most) {
  setenv("DPCOMM_SLOT_BYTES", std::to_string(kSmallSlot).c_str(), 1);
  for (int world = 1; world <= most; ++world) {
    run_group(world, group_options(fresh_name()), run_everything);
  }
  unsetenv("DPCOMM_SLOT_BYTES");
}

TEST(all_algorithms_in_worlds_of_1_to_5) { run_worlds(check::long_run() ? 9 : 5); }

TEST(all_algorithms_with_stalls) {
  setenv("DPCOMM_FAULTS", "stall=0.2,seed=7", 1);
  run_worlds(check::long_run() ? 5 : 3);
  unsetenv("DPCOMM_FAULTS");
}

TEST(all_algorithms_with_slow_senders) {
  setenv("DPCOMM_FAULTS", "delay_us=200,rank=1", 1);
  setenv("DPCOMM_SPIN_US", "0", 1);
  setenv("DPCOMM_YIELD_US", "0", 1);  // everybody sleeps at once
  run_worlds(3);
  unsetenv("DPCOMM_FAULTS");
  unsetenv("DPCOMM_SPIN_US");
  unsetenv("DPCOMM_YIELD_US");
}

/// Law 9: the caller may do as it likes with its tensors once the call has returned.
TEST(a_tensor_may_be_overwritten_after_the_return) {
  setenv("DPCOMM_FAULTS", "delay_us=300,rank=0", 1);
  setenv("DPCOMM_SLOT_BYTES", "4096", 1);
  run_group(3, group_options(fresh_name()), [](Communicator& communicator) {
    int salt = 0;
    for (Operation operation : every_algorithm()) {
      operation.count = 5000;
      operation.root = salt % 3;
      Trial trial(operation, communicator.rank(), 3, ++salt, true);
      communicator.run(trial.operation());
      trial.check();
      const bool output =
          operation.collective != Collective::kReduce || operation.root == communicator.rank();
      if (output) {
        std::memset(trial.operation().output, 0xff, operation.count * sizeof(float));
      } else {
        std::memset(const_cast<void*>(trial.operation().input), 0xff,
                    operation.count * sizeof(float));
      }
    }
  });
  unsetenv("DPCOMM_FAULTS");
  unsetenv("DPCOMM_SLOT_BYTES");
}

}  // namespace
}  // namespace dpcomm
