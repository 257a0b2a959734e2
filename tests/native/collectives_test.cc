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

/// Blocks of unequal size, between operations of other kinds.
void run_unequal(Communicator& communicator) {
  const int world = communicator.world();
  int salt = static_cast<int>(check::seed() % 1000);
  for (size_t most : {size_t{1}, size_t{700}, 3 * kSmallSlot + 5}) {
    for (Operation operation : every_unequal(world, most, salt)) {
      operation.dtype = salt % 3 == 0 ? Dtype::kBFloat16 : Dtype::kFloat32;
      run_and_check(communicator, operation, ++salt);
      Operation small;
      small.count = 100;
      if (salt % 3 == 0) run_and_check(communicator, small, ++salt);
    }
  }
}

TEST(blocks_of_unequal_size) {
  setenv("DPCOMM_SLOT_BYTES", std::to_string(kSmallSlot).c_str(), 1);
  for (int world = 1; world <= (check::long_run() ? 9 : 5); ++world) {
    run_group(world, group_options(fresh_name()), run_unequal);
  }
  setenv("DPCOMM_FAULTS", "stall=0.3,seed=5", 1);
  run_group(4, group_options(fresh_name()), run_unequal);
  unsetenv("DPCOMM_FAULTS");
  unsetenv("DPCOMM_SLOT_BYTES");
}

/// One text on all ranks, and nothing beyond the smaller one of the two sizes.
void expect_disagreement_of_a_pair(size_t sent, size_t expected, const char* path) {
  std::string texts[3];
  CommunicatorOptions options = group_options(fresh_name());
  options.timeout = std::chrono::milliseconds(5000);
  options.path = path;
  run_group(3, options, [&](Communicator& communicator) {
    const int rank = communicator.rank();
    std::vector<float> input(30, 1.0f), output(30, -1.0f);
    Operation operation;
    operation.collective = Collective::kAllToAll;
    operation.counts = operation.recv_counts = {2, 2, 2};
    if (rank == 1) operation.counts[2] = sent;
    if (rank == 2) operation.recv_counts[1] = expected;
    operation.input = input.data();
    operation.output = output.data();
    Operation barrier;
    barrier.collective = Collective::kBarrier;
    try {
      communicator.run(operation);
      communicator.run(barrier);
    } catch (const Error& error) {
      CHECK(error.kind() == ErrorKind::kUsage);
      texts[rank] = error.what();
    }
    size_t elems = 0;
    for (const size_t count : operation.recv_counts) elems += count;
    for (size_t i = elems; i < output.size(); ++i) CHECK_EQ(output[i], -1.0f);
  });
  CHECK(texts[0] == texts[1] && texts[1] == texts[2]);
  const std::string numbers = "sends " + std::to_string(sent) + " elements";
  CHECK(texts[0].find(numbers) != std::string::npos);
  CHECK(texts[0].find("expects " + std::to_string(expected)) != std::string::npos);
}

TEST(a_pair_that_disagrees_about_its_block) {
  for (const char* path : {"auto", "channels"}) {
    for (const auto [sent, expected] : {std::pair<size_t, size_t>{5, 7}, {7, 5}, {0, 3}, {3, 0}}) {
      expect_disagreement_of_a_pair(sent, expected, path);
    }
  }
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
      if (has_output(operation.collective, communicator.rank(), operation.root)) {
        std::memset(trial.operation().output, 0xff, trial.output_elems() * sizeof(float));
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
