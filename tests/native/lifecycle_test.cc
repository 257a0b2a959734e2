// Communicators that run from several threads, are closed or aborted in the middle of an operation,
// and are made again; over inproc, for the sanitizers.
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <filesystem>
#include <fstream>

#include "base/error.h"
#include "comm/flight_recorder.h"
#include "group.h"

namespace dpcomm {
namespace {

int scaled(int count) { return check::long_run() ? 10 * count : count; }

Operation sum(size_t count) {
  Operation operation;
  operation.count = count;
  return operation;
}

/// The kind of the error that `body` ends with.
template <class Body>
ErrorKind kind_of_error(Body body) {
  try {
    body();
  } catch (const Error& error) {
    return error.kind();
  }
  check::fail(__FILE__, __LINE__, "no error");
}

TEST(many_operations_in_flight) {
  run_group(3, group_options(fresh_name()), [](Communicator& communicator) {
    const int rank = communicator.rank();
    std::vector<std::unique_ptr<Trial>> trials;
    std::vector<std::shared_ptr<Work>> works;
    int salt = 0;
    for (int round = 0; round < scaled(3); ++round) {
      for (Operation operation : every_algorithm()) {
        operation.count = 100 + 37 * salt;
        operation.root = salt % 3;
        ++salt;
        trials.push_back(std::make_unique<Trial>(operation, rank, 3, salt, salt % 2 == 0));
        works.push_back(communicator.submit(trials.back()->operation()));
      }
    }
    std::atomic<int> called{0};
    for (const auto& work : works) work->then([&] { called.fetch_add(1); });
    for (size_t i = works.size(); i-- > 0;) works[i]->wait();
    for (const auto& trial : trials) trial->check();
    Operation last = sum(1);
    float value = 1;
    last.input = last.output = &value;
    communicator.run(last);  // inline, after what was submitted
    CHECK_EQ(value, 3.0f);
    CHECK_EQ(called.load(), static_cast<int>(works.size()));
  });
}

/// Order between threads is the user's affair; here all operations are alike, so any will do.
TEST(several_threads_use_one_communicator) {
  run_group(2, group_options(fresh_name()), [](Communicator& communicator) {
    std::vector<std::thread> threads;
    for (int thread = 0; thread < 3; ++thread) {
      threads.emplace_back([&, thread] {
        for (int i = 0; i < scaled(40); ++i) {
          std::vector<float> values(1000, 1.0f);
          Operation operation = sum(values.size());
          operation.input = operation.output = values.data();
          if ((thread + i) % 2 == 0) {
            communicator.run(operation);
          } else {
            communicator.submit(operation)->wait();
          }
          for (float value : values) CHECK_EQ(value, 2.0f);
          communicator.stats();
        }
      });
    }
    for (auto& thread : threads) thread.join();
    CHECK_EQ(communicator.stats().operations, static_cast<uint64_t>(3 * scaled(40)));
  });
}

TEST(several_communicators_at_once) {
  const std::string name = fresh_name();
  std::vector<std::thread> groups;
  for (int group = 0; group < 3; ++group) {
    groups.emplace_back([&, group] {
      run_group(2, group_options(name + std::to_string(group)), [&](Communicator& communicator) {
        for (int i = 0; i < scaled(30); ++i) {
          std::vector<float> values(100 * (group + 1), float(group));
          Operation operation = sum(values.size());
          operation.input = operation.output = values.data();
          communicator.run(operation);
          for (float value : values) CHECK_EQ(value, 2.0f * group);
        }
      });
    });
  }
  for (auto& group : groups) group.join();
}

TEST(the_same_name_again_and_again) {
  const CommunicatorOptions options = group_options(fresh_name());
  for (int i = 0; i < scaled(8); ++i) {
    run_group(3, options, [&](Communicator& communicator) {
      Trial trial(sum(10 + i), communicator.rank(), 3, i, true);
      communicator.run(trial.operation());
      trial.check();
    });
  }
}

/// Rank 0 waits for rank 1, which never comes; another thread of rank 0 closes.
void close_in_the_middle(bool asynchronous) {
  run_group(2, group_options(fresh_name()), [&](Communicator& communicator) {
    if (communicator.rank() == 1) {
      communicator.close();
      return;
    }
    std::vector<float> values(1000, 1.0f);
    Operation operation = sum(values.size());
    operation.input = operation.output = values.data();
    std::atomic<bool> started{false};
    std::thread closer([&] {
      while (!started.load()) std::this_thread::yield();
      std::this_thread::sleep_for(std::chrono::milliseconds(check::seed() % 5));
      communicator.close();
    });
    const ErrorKind kind = kind_of_error([&] {
      if (asynchronous) {
        const auto work = communicator.submit(operation);
        const auto queued = communicator.submit(operation);
        started.store(true);
        CHECK(kind_of_error([&] { queued->wait(); }) == ErrorKind::kPeer);
        work->wait();
      } else {
        started.store(true);
        communicator.run(operation);
      }
    });
    closer.join();
    // A thread that had not begun yet when the other closed is told so.
    CHECK(kind == ErrorKind::kPeer || (!asynchronous && kind == ErrorKind::kUsage));
    CHECK(kind_of_error([&] { communicator.run(operation); }) == ErrorKind::kUsage);
    CHECK(kind_of_error([&] { communicator.submit(operation); }) == ErrorKind::kUsage);
    communicator.close();
  });
}

TEST(close_during_an_operation) {
  for (int i = 0; i < scaled(5); ++i) close_in_the_middle(false);
}

TEST(close_during_asynchronous_operations) {
  for (int i = 0; i < scaled(5); ++i) close_in_the_middle(true);
}

TEST(abort_from_another_thread_ends_the_waits_of_all_ranks) {
  for (int i = 0; i < scaled(5); ++i) {
    std::atomic<int> started{0};
    run_group(3, group_options(fresh_name()), [&](Communicator& communicator) {
      std::vector<float> values(1000, 1.0f);
      Operation operation = sum(values.size());
      operation.input = operation.output = values.data();
      started.fetch_add(1);
      if (communicator.rank() == 2) {                          // the one that the others wait for
        while (started.load() < 3) std::this_thread::yield();  // an abort would end a start too
        std::thread([&] { communicator.abort("no more"); }).join();
        CHECK(kind_of_error([&] { communicator.run(operation); }) == ErrorKind::kPeer);
        return;
      }
      try {
        communicator.run(operation);
        check::fail(__FILE__, __LINE__, "no error");
      } catch (const Error& error) {
        CHECK(error.kind() == ErrorKind::kPeer);
        CHECK(std::string(error.what()).find("no more") != std::string::npos);
      }
    });
  }
}

TEST(a_close_in_a_callback_does_not_deadlock) {
  run_group(2, group_options(fresh_name()), [](Communicator& communicator) {
    auto values = std::make_shared<std::vector<float>>(10, 1.0f);
    Operation operation = sum(values->size());
    operation.input = operation.output = values->data();
    std::atomic<bool> closed{false};
    const auto work = communicator.submit(operation);
    work->then([&, values] {
      communicator.close();
      closed.store(true);
    });
    work->wait();
    while (!closed.load()) std::this_thread::yield();
    CHECK_EQ((*values)[9], 2.0f);
  });
}

TEST(a_communicator_is_dropped_with_operations_in_flight) {
  for (int i = 0; i < scaled(5); ++i) {
    std::vector<float> values(1000, 1.0f);
    std::vector<std::shared_ptr<Work>> works;
    run_group(2, group_options(fresh_name()), [&](Communicator& communicator) {
      if (communicator.rank() == 1) return;
      Operation operation = sum(values.size());
      operation.input = operation.output = values.data();
      for (int each = 0; each < 3; ++each) works.push_back(communicator.submit(operation));
    });
    for (const auto& work : works) {
      CHECK(work->done());
      CHECK(kind_of_error([&] { work->wait(); }) == ErrorKind::kPeer);
    }
  }
}

/// What must hold of entries at any moment.
void check_entries(const std::vector<FlightEntry>& entries, size_t groups) {
  for (size_t i = 0; i < entries.size(); ++i) {
    const FlightEntry& entry = entries[i];
    CHECK_EQ(entry.id, entries[0].id + i);
    CHECK(entry.group < groups);
    CHECK(entry.created_ns > 0);
    CHECK_EQ(entry.started_ns != 0, entry.state != FlightState::kScheduled);
    CHECK_EQ(entry.completed_ns != 0, entry.state == FlightState::kCompleted);
    if (entry.completed_ns != 0) CHECK(entry.completed_ns >= entry.started_ns);
  }
}

TEST(operations_are_recorded_while_others_dump_the_records) {
  const auto folder = std::filesystem::temp_directory_path() / str("dpcomm-flight-", getpid());
  std::filesystem::create_directory(folder);
  std::atomic<bool> ended{false};
  std::atomic<int> dumps{0};
  std::thread reader([&] {
    while (!ended.load()) {
      for (const auto& recorder : FlightRecorder::all()) {
        const auto entries = recorder->entries();
        check_entries(entries, recorder->groups().size());
        recorder->dump(folder.string() + "/");
        dumps.fetch_add(1);
      }
    }
  });
  for (int round = 0; round < scaled(2); ++round) {
    run_group(3, group_options(fresh_name()), [](Communicator& communicator) {
      const int rank = communicator.rank();
      std::vector<float> values(1000, 1.0f), sent(1000), received(1000);
      std::vector<std::shared_ptr<Work>> works;
      for (int i = 0; i < 100; ++i) {
        Operation operation = sum(10);
        operation.input = operation.output = values.data() + i * 10;
        i % 2 == 0 ? works.push_back(communicator.submit(operation)) : communicator.run(operation);
        works.push_back(communicator.send((rank + 1) % 3, i, sent.data() + i * 10, 40));
        works.push_back(communicator.recv((rank + 2) % 3, i, received.data() + i * 10, 40));
      }
      for (const auto& work : works) work->wait();
    });
  }
  ended = true;
  reader.join();
  CHECK(dumps.load() > 0);
  for (int rank = 0; rank < 3; ++rank) {
    const auto recorder = FlightRecorder::of(rank);
    for (const FlightEntry& entry : recorder->entries()) {
      if (entry.group + 1 == recorder->groups().size()) {
        CHECK(entry.state == FlightState::kCompleted);
      }
    }
    std::ifstream file(recorder->dump(folder.string() + "/"), std::ios::binary);
    CHECK_EQ(file.get(), 0x80);  // how a pickle begins
  }
  std::filesystem::remove_all(folder);
}

TEST(a_wait_with_a_limit_leaves_the_operation_alone) {
  run_group(2, group_options(fresh_name()), [](Communicator& communicator) {
    std::vector<float> values(10, 1.0f);
    Operation operation = sum(values.size());
    operation.input = operation.output = values.data();
    if (communicator.rank() == 1) {
      std::this_thread::sleep_for(std::chrono::milliseconds(50));
      communicator.run(operation);
      return;
    }
    const auto work = communicator.submit(operation);
    while (!work->done()) {
      try {
        work->wait(std::chrono::milliseconds(1));
      } catch (const Error& error) {
        CHECK(error.kind() == ErrorKind::kTimeout);
      }
    }
    work->wait();
    CHECK_EQ(values[0], 2.0f);
  });
}

TEST(ranks_that_disagree_get_the_same_text) {
  std::string texts[2];
  run_group(2, group_options(fresh_name()), [&](Communicator& communicator) {
    std::vector<float> values(64, 1.0f);
    Operation operation = sum(communicator.rank() == 0 ? 63 : 64);
    operation.input = operation.output = values.data();
    try {
      communicator.run(operation);
      check::fail(__FILE__, __LINE__, "no error");
    } catch (const Error& error) {
      CHECK(error.kind() == ErrorKind::kUsage);
      texts[communicator.rank()] = error.what();
    }
  });
  CHECK_EQ(texts[0], texts[1]);
  CHECK(texts[0].find("63") != std::string::npos && texts[0].find("64") != std::string::npos);
}

}  // namespace
}  // namespace dpcomm
