// The paths of a host (cpu/local_paths.h): all collectives in random order, with delays before
// whatever a rank publishes, and tensors that are written over as soon as their operation returns.
//
// Over inproc, so that ThreadSanitizer sees who touches the board, the buffers and the heap. It
// does not see process_vm_readv: there, and between processes, the values tell.
#include "cpu/local_paths.h"

#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <random>

#include "base/error.h"
#include "group.h"
#include "transport/transport.h"

namespace dpcomm {
namespace {

using Random = std::mt19937_64;
constexpr size_t kKiB = 1024;
constexpr size_t kBroadcastEdge = 256 * kKiB;

int scaled(int count) { return check::long_run() ? 20 * count : count; }

/// What decides about paths and chunks; set by environment variables, alike on all ranks.
struct Shape {
  int world = 2;
  size_t slot_bytes = 4096;  ///< the board's, too; bounce buffers are twice as large
  size_t single_copy = SIZE_MAX;
  bool readable = true;
};

void set_environment(const Shape& shape) {
  const auto set = [](const char* name, const std::string& value) {
    setenv(name, value.c_str(), 1);
  };
  set("DPCOMM_SLOT_BYTES", std::to_string(shape.slot_bytes));
  set("DPCOMM_SINGLE_COPY_BYTES",
      shape.single_copy == SIZE_MAX ? "" : std::to_string(shape.single_copy));
  set("DPCOMM_SINGLE_COPY", shape.readable ? "auto" : "off");
}

/// A transport whose rank is late, now and then, with what it publishes on the board.
std::unique_ptr<Transport> make_late(const std::string& kind, const std::string& name, int rank,
                                     const Shape& shape, Bootstrap& bootstrap) {
  TransportConfig config;
  config.rank = rank;
  config.world = shape.world;
  config.lanes = channel_lanes();
  config.slot_bytes = shape.slot_bytes;
  config.name = name;
  config.timeout = std::chrono::milliseconds(20000);
  config.bootstrap = &bootstrap;
  auto transport = make_transport(kind, config);
  CHECK(transport->board() != nullptr);
  transport->board()->plant([random = Random(check::seed() + rank)]() mutable {
    const uint64_t draw = random() % 32;
    if (draw == 0) std::this_thread::sleep_for(std::chrono::microseconds(random() % 300));
    if (draw >= 24) std::this_thread::yield();
    return PublishFault::kNone;
  });
  return transport;
}

CommunicatorOptions late_options(const std::string& name) {
  CommunicatorOptions options = group_options(name);
  options.timeout = std::chrono::milliseconds(20000);
  if (std::getenv("DPCOMM_TIMEOUT") != nullptr) {  // where a fault is planted that makes ranks wait
    options.timeout = CommunicatorOptions::from_environment().timeout;
  }
  return options;
}

using TransportBody = std::function<void(Transport&, Communicator&)>;

void run_rank(const std::string& kind, const std::string& name, int rank, const Shape& shape,
              Bootstrap& bootstrap, const TransportBody& body) {
  try {
    auto transport = make_late(kind, name, rank, shape, bootstrap);
    Transport& inner = *transport;
    Communicator communicator(std::move(transport), late_options(name));
    body(inner, communicator);
  } catch (const std::exception& error) {
    check::fail(__FILE__, __LINE__, "rank " + std::to_string(rank) + ": " + error.what());
  }
}

void run_threads(const Shape& shape, const TransportBody& body) {
  set_environment(shape);
  const std::string name = fresh_name();
  std::vector<std::thread> ranks;
  for (int rank = 0; rank < shape.world; ++rank) {
    ranks.emplace_back([&, rank] {
      NoBootstrap bootstrap;
      run_rank("inproc", name, rank, shape, bootstrap, body);
    });
  }
  for (std::thread& rank : ranks) rank.join();
}

/// A file per key.
class FolderBootstrap final : public Bootstrap {
 public:
  explicit FolderBootstrap(std::filesystem::path folder) : folder_(std::move(folder)) {}
  void set(const std::string& key, const std::string& value) override {
    const auto unfinished = folder_ / (name_of(key) + "." + std::to_string(getpid()));
    std::ofstream(unfinished, std::ios::binary) << value;
    std::filesystem::rename(unfinished, folder_ / name_of(key));
  }
  bool get(const std::string& key, std::chrono::milliseconds timeout, std::string& value) override {
    const auto deadline = Clock::now() + timeout;
    for (;;) {
      std::ifstream in(folder_ / name_of(key), std::ios::binary);
      if (in) {
        value.assign(std::istreambuf_iterator<char>(in), {});
        return true;
      }
      if (Clock::now() > deadline) return false;
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  }

 private:
  static std::string name_of(std::string key) {
    std::replace(key.begin(), key.end(), '/', '_');
    return "key_" + key;
  }
  std::filesystem::path folder_;
};

/// Ranks as processes over shm. `prepare(rank)` runs before the group starts.
void run_processes(const Shape& shape, const std::function<void(int)>& prepare,
                   const TransportBody& body) {
  set_environment(shape);
  std::string folder = std::filesystem::temp_directory_path() / "local_paths_test_XXXXXX";
  CHECK(mkdtemp(folder.data()) != nullptr);
  std::cout.flush();
  std::vector<pid_t> children;
  for (int rank = 0; rank < shape.world; ++rank) {
    const pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
      alarm(60);
      FolderBootstrap bootstrap(folder);
      prepare(rank);
      run_rank("shm", "processes", rank, shape, bootstrap, body);
      std::_Exit(0);
    }
    children.push_back(child);
  }
  bool good = true;
  for (const pid_t child : children) {
    int status = 0;
    CHECK_EQ(waitpid(child, &status, 0), child);
    good = good && WIFEXITED(status) && WEXITSTATUS(status) == 0;
  }
  std::filesystem::remove_all(folder);
  CHECK(good);
}

// --- random operations

template <class T, size_t N>
const T& one_of(Random& random, const T (&choices)[N]) {
  return choices[random() % N];
}

/// Elements at, just below or just above a size where something changes; else any few.
size_t some_count(Random& random, size_t elem, const Shape& shape) {
  if (random() % 4 == 0) return random() % (20 * kKiB / elem);
  const size_t bounce = 2 * shape.slot_bytes;
  const size_t single = std::min(shape.single_copy, bounce);
  const size_t edges[] = {8,
                          48,
                          1024,
                          shape.slot_bytes,
                          8192,
                          bounce,
                          2 * bounce,
                          3 * bounce,
                          5 * bounce,
                          single,
                          7 * bounce + 72,
                          8192 / static_cast<size_t>(shape.world - 1)};
  size_t bytes = one_of(random, edges);
  if (random() % 4 == 0) bytes /= shape.world;
  const size_t count = bytes / elem + random() % 3;
  return count > 0 ? count - 1 : 0;
}

/// The same on all ranks that draw from the same seed.
Operation some_operation(Random& random, const Shape& shape) {
  const Collective collectives[] = {Collective::kAllReduce,     Collective::kAllReduce,
                                    Collective::kAllReduce,     Collective::kAllReduce,
                                    Collective::kReduceScatter, Collective::kAllGather,
                                    Collective::kBroadcast,     Collective::kAllToAll};
  const Dtype dtypes[] = {Dtype::kFloat32, Dtype::kFloat32, Dtype::kFloat64,
                          Dtype::kInt64,   Dtype::kInt8,    Dtype::kBFloat16};
  const ReduceOp ops[] = {ReduceOp::kSum, ReduceOp::kSum, ReduceOp::kMax, ReduceOp::kProduct};
  Operation operation;
  operation.collective = one_of(random, collectives);
  operation.dtype = one_of(random, dtypes);
  operation.op = one_of(random, ops);
  operation.root = static_cast<int>(random() % shape.world);
  const size_t elem = size_bytes(operation.dtype);
  operation.count = some_count(random, elem, shape);
  if (operation.collective == Collective::kBroadcast && random() % 2 == 0) {
    operation.dtype = Dtype::kInt64;
    operation.count = kBroadcastEdge / sizeof(int64_t) + random() % 3 - 1;
  }
  const size_t parts[] = {2, operation.count + 1, 1, 7, 3};
  const uint64_t turn = random();
  if (has_blocks(operation.collective) && random() % 3 == 0) {
    for (int rank = 0; rank < shape.world; ++rank) {
      operation.counts.push_back(operation.count / parts[(rank + turn) % 5]);
    }
  }
  operation.algorithm = random() % 12 == 0 ? "ring" : "auto";  // a schedule, over channels
  return operation;
}

/// Which of a rank's tensors lie in the heap: nobody's, everybody's or some.
InHeap some_place(Random& shared, Random& own) {
  const uint64_t kind = shared() % 3;
  const uint64_t draw = own();
  if (kind == 0) return {false, false};
  if (kind == 1) return {true, true};
  return {draw % 4 < 3, draw / 4 % 4 < 3};
}

/// `rounds` times some operations back to back. `submits`: some of them by another thread.
void run_anything(Communicator& communicator, const Shape& shape, int rounds, bool submits) {
  constexpr int kBackToBack = 8;
  const int rank = communicator.rank();
  Random shared(check::seed()), own(check::seed() * 31 + rank + 1);
  for (int round = 0; round < rounds; ++round) {
    std::vector<std::unique_ptr<Trial>> trials;
    for (int i = 0; i < kBackToBack; ++i) {
      const Operation operation = some_operation(shared, shape);
      const int salt = static_cast<int>(shared() % 1000);
      const bool in_place = shared() % 2 == 0;
      const InHeap in_heap = some_place(shared, own);
      trials.push_back(
          std::make_unique<Trial>(operation, rank, shape.world, salt, in_place, in_heap));
    }
    for (const auto& trial : trials) {
      if (submits && own() % 4 == 0) {
        communicator.submit(trial->operation())->wait();
      } else {
        communicator.run(trial->operation());
      }
      const uint64_t draw = own() % 3;
      if (draw > 0) trial->reuse(draw == 1);
      if (shared() % 8 == 0) {
        Operation barrier;
        barrier.collective = Collective::kBarrier;
        communicator.run(barrier);
      }
    }
    for (const auto& trial : trials) trial->check();
  }
}

void anything(const Shape& shape, int rounds, bool submits = false) {
  run_threads(shape, [&](Transport& transport, Communicator& communicator) {
    CHECK(transport.reach() == (shape.readable ? Reach::kCopies : Reach::kNone));
    run_anything(communicator, shape, scaled(rounds), submits);
  });
}

TEST(anything_over_two_ranks) { anything({2}, 60); }
TEST(anything_over_three_ranks) { anything({3, 16 * kKiB}, 20); }
TEST(anything_over_four_ranks_by_another_thread) { anything({4}, 25, true); }
TEST(anything_over_five_ranks) { anything({5}, 20); }
TEST(anything_read_by_the_peers) {
  anything({2, 4096, 3 * 4096 + 4}, 25);
  anything({3, 4096, 0}, 20);
}
TEST(anything_where_nobody_may_read) { anything({3, 4096, SIZE_MAX, false}, 15); }

/// A rank that is late to say that its part is reduced lets those meet that wait for it.
TEST(no_tensor_is_left_while_a_peer_reads_it) {
  const Shape shape{3, 4096, 0};
  run_threads(shape, [&](Transport& transport, Communicator& communicator) {
    Random own(check::seed() + communicator.rank());
    const int late = transport.rank() == 2 ? 200 : 0;
    transport.board()->plant([late] {
      std::this_thread::sleep_for(std::chrono::microseconds(late));
      return PublishFault::kNone;
    });
    const Collective collectives[] = {Collective::kAllReduce, Collective::kAllGather,
                                      Collective::kReduceScatter, Collective::kAllToAll};
    for (int i = 0; i < scaled(24); ++i) {
      Operation operation;
      operation.collective = collectives[i % 4];
      operation.dtype = Dtype::kInt8;
      operation.count = size_t{1} << 17;
      Trial trial(operation, communicator.rank(), shape.world, i, false);
      communicator.run(trial.operation());
      trial.reuse(transport.rank() == 1 || own() % 4 == 0);
      trial.check();
    }
  });
}

/// The first operation with heaps of new ranks, where they do not all come to be used.
TEST(heaps_are_introduced) {
  for (int i = 0; i < scaled(40); ++i) {
    run_threads({3}, [&](Transport&, Communicator& communicator) {
      const int rank = communicator.rank();
      for (const size_t count : {5000, 300, 3000}) {
        Operation operation;
        operation.dtype = i % 4 < 2 ? Dtype::kInt64 : Dtype::kInt8;  // every byte shows
        operation.count = i % 2 == 0 ? count : count / 10 + 270;
        const bool in_heap = (rank + i) % 3 > 0 || count == 3000;
        Trial trial(operation, rank, 3, i, i % 4 == 0, {in_heap, in_heap});
        communicator.run(trial.operation());
        trial.reuse(true);
        trial.check();
      }
    });
  }
}

/// Results of large tensors go past the caches, and are there when the others are told so.
TEST(a_large_tensor_in_the_heap) {
  const Shape shape{2, 256 * kKiB};
  run_threads(shape, [&](Transport&, Communicator& communicator) {
    for (const bool in_place : {false, true}) {
      Operation operation;
      operation.count = (size_t{4} << 20) + 5;
      Trial trial(operation, communicator.rank(), shape.world, 1, in_place, {true, true});
      communicator.run(trial.operation());
      trial.reuse(communicator.rank() == 0 && in_place);
      trial.check();
    }
  });
}

/// The same sequence of calls but for one, which differs in `change`.
void disagree(const Shape& shape, size_t count, const std::function<void(Operation&)>& change) {
  run_threads(shape, [&](Transport&, Communicator& communicator) {
    Operation operation;
    operation.count = count;
    std::vector<float> values(2 * count, 1.0f);
    operation.input = operation.output = values.data();
    try {
      communicator.run(operation);  // here already for a rank that is late
      if (communicator.rank() == 1) change(operation);
      communicator.run(operation);
    } catch (const Error& error) {
      CHECK(error.kind() == ErrorKind::kUsage);
      CHECK(std::string(error.what()).find("disagree") != std::string::npos);
      return;
    }
    check::fail(__FILE__, __LINE__, "no error");
  });
}

TEST(calls_that_do_not_match_are_told) {
  for (const size_t count : {4, 200, 30000}) {
    disagree({3}, count, [](Operation& operation) { operation.op = ReduceOp::kMax; });
    disagree({3}, count, [](Operation& operation) { operation.count += 1; });
    disagree({2, 4096, 0}, count, [](Operation& operation) { operation.op = ReduceOp::kMax; });
  }
}

// --- processes

TEST(anything_between_processes) {
  const Shape shape{3, 4096, 5 * 4096};
  run_processes(
      shape, [](int) {},
      [&](Transport& transport, Communicator& communicator) {
        CHECK(transport.process_id(transport.rank()) == static_cast<uint32_t>(getpid()));
        if (transport.reach() == Reach::kNone) std::cout << "(no reading here) ";
        run_anything(communicator, shape, scaled(15), true);
      });
}

/// A rank that has no file descriptors left cannot map the others' heaps: then no rank may write
/// to or read from them, and all go on.
TEST(a_heap_that_one_rank_cannot_map) {
  const Shape shape{3};
  run_processes(
      shape, [](int) {},
      [&](Transport&, Communicator& communicator) {
        SharedHeap::free(SharedHeap::allocate(4096));
        rlimit files;
        CHECK_EQ(getrlimit(RLIMIT_NOFILE, &files), 0);
        if (communicator.rank() == 1) {
          files.rlim_cur = 3;
          CHECK_EQ(setrlimit(RLIMIT_NOFILE, &files), 0);
        }
        for (int i = 0; i < 12; ++i) {
          Operation operation;
          operation.collective = i % 3 == 2 ? Collective::kAllGather : Collective::kAllReduce;
          operation.count = i % 2 == 0 ? 300 : 20000;  // small, and not
          Trial trial(operation, communicator.rank(), shape.world, i, false, {true, true});
          communicator.run(trial.operation());
          trial.reuse(i % 4 != 0);
          trial.check();
        }
      });
}

/// From now on this process may not call process_vm_readv. False if it cannot forbid itself that.
bool forbid_reading() {
  sock_filter program[] = {
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_process_vm_readv, 0, 1),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  };
  const sock_fprog filter{std::size(program), program};
  return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 &&
         prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter) == 0;
}

TEST(a_rank_that_a_filter_forbids_to_read) {
  if (prctl(PR_GET_SECCOMP) < 0) {
    std::cout << "(no filters here) ";
    return;
  }
  const Shape shape{2, 4096, 0};
  const auto prepare = [](int rank) {
    if (rank == 1) CHECK(forbid_reading());
  };
  run_processes(shape, prepare, [&](Transport& transport, Communicator& communicator) {
    CHECK(transport.reach() == Reach::kNone);  // on both
    CHECK_EQ(transport.single_copy_bytes(), SIZE_MAX);
    run_anything(communicator, shape, scaled(15), false);
  });
}

}  // namespace
}  // namespace dpcomm
