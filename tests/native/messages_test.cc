// Messages between two ranks: any order of tags, any source, beside collectives, and what ends
// them; over inproc, for the sanitizers.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <random>

#include "base/error.h"
#include "cpu/messenger.h"
#include "group.h"

namespace dpcomm {
namespace {

constexpr int kAny = Communicator::kAnySource;

int scaled(int count) { return check::long_run() ? 10 * count : count; }

/// Bytes that only this message has, so that one in another's place is seen.
std::vector<uint8_t> content(size_t bytes, int from, int to, uint32_t tag, int number) {
  std::vector<uint8_t> data(bytes);
  const uint32_t salt = from * 7919u + to * 104729u + tag * 1299709u + number * 15485863u;
  for (size_t i = 0; i < bytes; ++i) data[i] = static_cast<uint8_t>((i * 2654435761u + salt) >> 13);
  return data;
}

/// A buffer between guards, poisoned.
struct Inbox {
  static constexpr size_t kGuard = 64;
  std::vector<uint8_t> memory;
  size_t bytes;

  explicit Inbox(size_t n) : memory(n + 2 * kGuard, 0x5a), bytes(n) {}
  uint8_t* data() { return memory.data() + kGuard; }
  void check(const std::vector<uint8_t>& expected) const {
    CHECK_EQ(bytes, expected.size());
    for (size_t i = 0; i < kGuard; ++i) {
      CHECK_EQ(int{memory[i]}, 0x5a);
      CHECK_EQ(int{memory[memory.size() - 1 - i]}, 0x5a);
    }
    CHECK(std::equal(expected.begin(), expected.end(), memory.begin() + kGuard));
  }
};

/// The error that `body` ends with.
template <class Body>
Error error_of(Body body) {
  try {
    body();
  } catch (const Error& error) {
    return error;
  }
  check::fail(__FILE__, __LINE__, "no error");
}

bool has(const Error& error, const std::string& part) {
  const bool found = std::string(error.what()).find(part) != std::string::npos;
  if (!found) check::fail(__FILE__, __LINE__, str("'", part, "' is not in '", error.what(), "'"));
  return found;
}

CommunicatorOptions hasty(int milliseconds) {
  CommunicatorOptions options = group_options(fresh_name());
  options.timeout = std::chrono::milliseconds(milliseconds);
  return options;
}

TEST(tags_come_in_any_order) {
  run_group(2, group_options(fresh_name()), [](Communicator& communicator) {
    const int rank = communicator.rank(), peer = 1 - rank;
    constexpr int kMessages = 40;
    std::vector<std::vector<uint8_t>> out;
    std::vector<Inbox> in;
    std::vector<std::shared_ptr<Work>> works;
    const auto bytes = [](int i) { return size_t(i % 7 == 0 ? 0 : i * i * 97); };
    for (int i = 0; i < kMessages; ++i) {
      out.push_back(content(bytes(i), rank, peer, i, 0));
      in.emplace_back(bytes(i));
    }
    for (int i = 0; i < kMessages; ++i) {
      works.push_back(communicator.send(peer, i, out[i].data(), out[i].size()));
    }
    for (int i = kMessages; i-- > 0;) {
      works.push_back(communicator.recv(peer, i, in[i].data(), in[i].bytes));
    }
    for (const auto& work : works) work->wait();
    for (int i = 0; i < kMessages; ++i) in[i].check(content(bytes(i), peer, rank, i, 0));
    CHECK_EQ(works.back()->source(), peer);
    CHECK_EQ(works.front()->source(), -1);
    CHECK_EQ(communicator.stats().messages, uint64_t{2 * kMessages});
  });
}

TEST(one_tag_keeps_its_order) {
  run_group(2, group_options(fresh_name()), [](Communicator& communicator) {
    const int rank = communicator.rank(), peer = 1 - rank;
    const int messages = scaled(100);
    // Short and long ones by turns: the long ones take another way, and may not be overtaken.
    const auto bytes = [](int i) { return size_t(i % 3 == 0 ? 50000 : i % 3 * 100); };
    for (const bool late : {false, true}) {  // whether receives come after the messages
      std::vector<std::vector<uint8_t>> out;
      std::vector<Inbox> in;
      std::vector<std::shared_ptr<Work>> works;
      for (int i = 0; i < messages; ++i) out.push_back(content(bytes(i), rank, peer, 3, i));
      for (int i = 0; i < messages; ++i) in.emplace_back(bytes(i));
      const auto send_all = [&] {
        for (const auto& each : out) {
          works.push_back(communicator.send(peer, 3, each.data(), each.size()));
        }
      };
      if (late) {
        send_all();
        std::this_thread::sleep_for(std::chrono::milliseconds(20));
      }
      for (auto& each : in) works.push_back(communicator.recv(peer, 3, each.data(), each.bytes));
      if (!late) send_all();
      for (const auto& work : works) work->wait();
      for (int i = 0; i < messages; ++i) in[i].check(content(bytes(i), peer, rank, 3, i));
    }
  });
}

TEST(large_messages_both_ways_at_once) {
  run_group(2, group_options(fresh_name()), [](Communicator& communicator) {
    const int rank = communicator.rank(), peer = 1 - rank;
    constexpr int kMessages = 4;
    const size_t bytes = (size_t{1} << 20) * scaled(1) + 12345;
    std::vector<std::vector<uint8_t>> out;
    std::vector<Inbox> in;
    std::vector<std::shared_ptr<Work>> works;
    for (int i = 0; i < kMessages; ++i) {
      out.push_back(content(bytes, rank, peer, i, 0));
      in.emplace_back(bytes);
    }
    for (int i = 0; i < kMessages; ++i) {
      works.push_back(communicator.send(peer, i, out[i].data(), bytes));
    }
    for (int i = 0; i < kMessages; ++i) {
      const int tag = rank == 0 ? i : kMessages - 1 - i;
      works.push_back(communicator.recv(peer, tag, in[tag].data(), bytes));
    }
    for (const auto& work : works) work->wait();
    for (int i = 0; i < kMessages; ++i) in[i].check(content(bytes, peer, rank, i, 0));
  });
}

/// More short messages than the receiver keeps: the rest is sent once more.
TEST(more_unexpected_messages_than_are_kept) {
  run_group(2, group_options(fresh_name()), [](Communicator& communicator) {
    const size_t bytes = Messenger::kShortBytes / 2;
    const int messages = 3 * static_cast<int>(Messenger::kKeptBytes / bytes);
    if (communicator.rank() == 0) {
      std::vector<std::vector<uint8_t>> out;
      std::vector<std::shared_ptr<Work>> works;
      for (int i = 0; i < messages; ++i) out.push_back(content(bytes, 0, 1, 0, i));
      for (const auto& each : out) works.push_back(communicator.send(1, 0, each.data(), bytes));
      communicator.send(1, 1, nullptr, 0)->wait();
      for (const auto& work : works) work->wait();
      CHECK(communicator.stats().wire_bytes > 2 * bytes * messages - 2 * Messenger::kKeptBytes);
    } else {
      communicator.recv(0, 1, nullptr, 0)->wait();  // by now all others have been announced
      for (int i = 0; i < messages; ++i) {
        Inbox in(bytes);
        communicator.recv(0, 0, in.data(), bytes)->wait();
        in.check(content(bytes, 0, 1, 0, i));
      }
    }
  });
}

TEST(a_receive_from_any_rank_promises_each_message_once) {
  constexpr int kWorld = 4;
  const int each = scaled(30);
  run_group(kWorld, group_options(fresh_name()), [&](Communicator& communicator) {
    const int rank = communicator.rank();
    const auto bytes = [](int i) { return size_t(i % 4 == 3 ? 40000 : 100 + i); };
    if (rank > 0) {
      std::vector<std::vector<uint8_t>> out;
      std::vector<std::shared_ptr<Work>> works;
      for (int i = 0; i < each; ++i) out.push_back(content(bytes(i), rank, 0, i, 0));
      for (int i = 0; i < each; ++i) {
        works.push_back(communicator.send(0, i, out[i].data(), out[i].size()));
      }
      for (const auto& work : works) work->wait();
      return;
    }
    // Of each tag, two receives from any rank, and between them one that names its sender.
    for (int i = 0; i < each; ++i) {
      Inbox first(bytes(i)), named(bytes(i)), last(bytes(i));
      const int sender = 1 + i % 3;
      const auto a = communicator.recv(sender, i, named.data(), bytes(i));
      const auto b = communicator.recv(kAny, i, first.data(), bytes(i));
      const auto c = communicator.recv(kAny, i, last.data(), bytes(i));
      for (const auto& work : {a, b, c}) work->wait();
      CHECK_EQ(a->source(), sender);
      CHECK(b->source() != c->source() && b->source() != sender && c->source() != sender);
      named.check(content(bytes(i), sender, 0, i, 0));
      first.check(content(bytes(i), b->source(), 0, i, 0));
      last.check(content(bytes(i), c->source(), 0, i, 0));
    }
  });
}

TEST(a_ring_of_messages_beside_collectives) {
  constexpr int kWorld = 3;
  run_group(kWorld, group_options(fresh_name()), [](Communicator& communicator) {
    const int rank = communicator.rank();
    const int next = (rank + 1) % kWorld, before = (rank + kWorld - 1) % kWorld;
    std::vector<float> values(20000, 1.0f);
    Operation sum;
    sum.count = values.size();
    sum.input = sum.output = values.data();
    for (int i = 0; i < scaled(20); ++i) {
      std::fill(values.begin(), values.end(), 1.0f);
      const size_t bytes = i % 2 == 0 ? 200 : 150000;
      const auto out = content(bytes, rank, next, 5, i);
      Inbox in(bytes);
      const auto running = i % 3 == 0 ? nullptr : communicator.submit(sum);
      const auto sent = communicator.send(next, 5, out.data(), bytes);
      const auto received = communicator.recv(before, 5, in.data(), bytes);
      if (running == nullptr) communicator.run(sum);
      received->wait();
      sent->wait();
      if (running != nullptr) running->wait();
      in.check(content(bytes, before, rank, 5, i));
      for (const float value : values) CHECK_EQ(value, float{kWorld});
    }
  });
}

/// A random program: the same messages on all ranks, posted in an order that each draws itself. Of
/// one pair and tag the order stays.
TEST(random_programs) {
  std::mt19937_64 random(check::seed());
  for (int round = 0; round < scaled(6); ++round) {
    struct Planned {
      int from, to, number;
      uint32_t tag;
      size_t bytes;
    };
    const int world = 2 + static_cast<int>(random() % 3);
    std::vector<Planned> plan;
    std::vector<int> numbers(world * world * 4, 0);
    const size_t sizes[] = {0, 1, 700, 8192, 8193, 33000, 200000};
    for (int i = 0; i < 120; ++i) {
      Planned each;
      each.from = static_cast<int>(random() % world);
      each.to = (each.from + 1 + static_cast<int>(random() % (world - 1))) % world;
      each.tag = random() % 4;
      each.bytes = sizes[random() % std::size(sizes)];
      each.number = numbers[(each.from * world + each.to) * 4 + each.tag]++;
      plan.push_back(each);
    }
    const uint64_t salt = random();
    run_group(world, group_options(fresh_name()), [&](Communicator& communicator) {
      const int rank = communicator.rank();
      std::mt19937_64 own(salt + rank);
      struct Running {
        Planned planned;
        bool sends;
        std::vector<uint8_t> out;
        std::unique_ptr<Inbox> in;
        std::shared_ptr<Work> work;
      };
      // Queues that keep the order each for itself; which one goes next is drawn.
      std::vector<std::vector<Running>> queues(2 * world * 4);
      for (const Planned& each : plan) {
        for (const bool sends : {true, false}) {
          if ((sends ? each.from : each.to) != rank) continue;
          const int peer = sends ? each.to : each.from;
          queues[(peer * 4 + each.tag) * 2 + sends].push_back({each, sends, {}, nullptr, nullptr});
        }
      }
      std::vector<size_t> done(queues.size(), 0);
      size_t left = 0;
      for (const auto& queue : queues) left += queue.size();
      while (left > 0) {
        const size_t q = own() % queues.size();
        if (done[q] == queues[q].size()) continue;
        Running& next = queues[q][done[q]++];
        const Planned& p = next.planned;
        if (next.sends) {
          next.out = content(p.bytes, p.from, p.to, p.tag, p.number);
          next.work = communicator.send(p.to, p.tag, next.out.data(), p.bytes);
        } else {
          next.in = std::make_unique<Inbox>(p.bytes);
          next.work = communicator.recv(p.from, p.tag, next.in->data(), p.bytes);
        }
        if (own() % 8 == 0) std::this_thread::yield();
        --left;
      }
      for (auto& queue : queues) {
        for (Running& each : queue) {
          each.work->wait();
          const Planned& p = each.planned;
          if (!each.sends) each.in->check(content(p.bytes, p.from, p.to, p.tag, p.number));
        }
      }
    });
  }
}

TEST(several_threads_send_and_receive) {
  run_group(2, group_options(fresh_name()), [](Communicator& communicator) {
    const int rank = communicator.rank(), peer = 1 - rank;
    std::vector<std::thread> threads;
    for (uint32_t tag = 0; tag < 4; ++tag) {
      threads.emplace_back([&, tag] {
        for (int i = 0; i < scaled(50); ++i) {
          const size_t bytes = i % 5 == 0 ? 100000 : 64;
          const auto out = content(bytes, rank, peer, tag, i);
          Inbox in(bytes);
          const auto sent = communicator.send(peer, tag, out.data(), bytes);
          communicator.recv(peer, tag, in.data(), bytes)->wait();
          sent->wait();
          in.check(content(bytes, peer, rank, tag, i));
        }
      });
    }
    for (auto& thread : threads) thread.join();
  });
}

/// A callback waits for a message of its own, and for one that was complete with the first.
TEST(callbacks_send_receive_and_wait) {
  run_group(2, group_options(fresh_name()), [](Communicator& communicator) {
    const int rank = communicator.rank(), peer = 1 - rank;
    std::atomic<int> called{0};
    for (int i = 0; i < scaled(10); ++i) {
      Inbox in[3] = {Inbox(100), Inbox(100), Inbox(70000)};
      const auto out = content(70000, rank, peer, 0, i);
      const auto first = communicator.recv(peer, 0, in[0].data(), 100);
      const auto second = communicator.recv(peer, 1, in[1].data(), 100);
      std::atomic<bool> ended{false};
      first->then([&] {
        second->wait();
        const auto sent = communicator.send(peer, 2, out.data(), out.size());
        communicator.recv(peer, 2, in[2].data(), out.size())->wait();
        sent->wait();
        std::vector<float> values(100, 1.0f);
        Operation sum;
        sum.count = values.size();
        sum.input = sum.output = values.data();
        communicator.run(sum);
        CHECK_EQ(values[99], 2.0f);
        called.fetch_add(1);
        ended.store(true);
      });
      Operation barrier;  // nobody sends before the peer has its callback
      barrier.collective = Collective::kBarrier;
      communicator.run(barrier);
      const auto a = communicator.send(peer, 0, out.data(), 100);
      const auto b = communicator.send(peer, 1, out.data(), 100);
      a->wait();
      b->wait();
      while (!ended.load()) std::this_thread::yield();
      in[2].check(content(70000, peer, rank, 0, i));
    }
    CHECK_EQ(called.load(), scaled(10));
  });
}

TEST(arguments_that_make_no_sense) {
  run_group(2, group_options(fresh_name()), [](Communicator& communicator) {
    const int rank = communicator.rank();
    uint8_t byte = 0;
    for (const int peer : {rank, 2, -2}) {
      CHECK(error_of([&] { communicator.send(peer, 0, &byte, 1); }).kind() == ErrorKind::kUsage);
      CHECK(error_of([&] { communicator.recv(peer, 0, &byte, 1); }).kind() == ErrorKind::kUsage);
    }
    CHECK(error_of([&] { communicator.send(kAny, 0, &byte, 1); }).kind() == ErrorKind::kUsage);
    CHECK(error_of([&] { communicator.send(1 - rank, 0, nullptr, 1); }).kind() ==
          ErrorKind::kUsage);
    const auto sent = communicator.send(1 - rank, 0, &byte, 1);  // no harm was done
    uint8_t other = 1;
    communicator.recv(1 - rank, 0, &other, 1)->wait();
    sent->wait();
  });
  run_group(1, group_options(fresh_name()), [](Communicator& communicator) {
    uint8_t byte = 0;
    has(error_of([&] { communicator.recv(kAny, 0, &byte, 1); }), "alone");
  });
}

TEST(sizes_that_differ_are_an_error_of_both) {
  for (const size_t sent : {size_t{99}, size_t{101}, size_t{0}, size_t{50000}}) {
    for (const bool sender_first : {false, true}) {
      std::string texts[2];
      run_group(2, group_options(fresh_name()), [&](Communicator& communicator) {
        const int rank = communicator.rank();
        if ((rank == 0) != sender_first) std::this_thread::sleep_for(std::chrono::milliseconds(5));
        const std::vector<uint8_t> out(sent, 1);
        Inbox in(100);
        const auto work = rank == 0 ? communicator.send(1, 7, out.data(), sent)
                                    : communicator.recv(0, 7, in.data(), 100);
        const Error error = error_of([&] { work->wait(); });
        CHECK(error.kind() == ErrorKind::kUsage);
        texts[rank] = error.what();
        has(error, "rank 0 ");
        has(error, "rank 1 ");
        has(error, str(sent, " bytes"));
        has(error, "100 bytes");
        has(error, "tag 7");
        in.check(std::vector<uint8_t>(100, 0x5a));
        // What comes later gets the same.
        float value = 1;
        Operation sum;
        sum.count = 1;
        sum.input = sum.output = &value;
        CHECK_EQ(std::string(error_of([&] { communicator.run(sum); }).what()), texts[rank]);
        uint8_t byte = 0;
        const auto late = communicator.recv(1 - rank, 0, &byte, 1);
        CHECK_EQ(std::string(error_of([&] { late->wait(); }).what()), texts[rank]);
      });
      CHECK_EQ(texts[0], texts[1]);
    }
  }
}

TEST(a_message_that_nobody_sends_or_receives) {
  for (const bool sends : {false, true}) {
    std::string texts[2];
    run_group(2, hasty(30000), [&](Communicator& communicator) {
      const int rank = communicator.rank();
      std::vector<uint8_t> buffer(300);
      const std::chrono::milliseconds limit{rank == 0 ? 150 : 0};
      // The peer waits for something else.
      const auto work = sends && rank == 0
                            ? communicator.send(1, 4, buffer.data(), 300, limit)
                            : communicator.recv(1 - rank, 4 + rank, buffer.data(), 300, limit);
      std::shared_ptr<Work> other;
      if (rank == 1 && !sends) other = communicator.send(0, 9, buffer.data(), 12);
      const Error error = error_of([&] { work->wait(); });
      CHECK(error.kind() == ErrorKind::kTimeout);
      texts[rank] = error.what();
      has(error, str(sends ? "send" : "receive", " of 300 bytes"));
      has(error, "tag 4");
      has(error, sends ? "rank 1 (pid" : "12 bytes with tag 9");
      if (other != nullptr) error_of([&] { other->wait(); });
    });
    CHECK_EQ(texts[0], texts[1]);
  }
}

TEST(an_abort_ends_messages_and_collectives) {
  run_group(3, group_options(fresh_name()), [](Communicator& communicator) {
    const int rank = communicator.rank();
    if (rank == 0) {
      std::vector<uint8_t> buffer(1 << 20);
      const auto work = communicator.send(1, 0, buffer.data(), buffer.size());
      std::thread other([&] {
        std::this_thread::sleep_for(std::chrono::milliseconds(30));
        communicator.abort("enough");
      });
      CHECK(error_of([&] { work->wait(); }).kind() == ErrorKind::kPeer);
      other.join();
    } else if (rank == 1) {
      uint8_t byte = 0;
      has(error_of([&] { communicator.recv(kAny, 1, &byte, 1)->wait(); }), "enough");
    } else {
      float value = 1;
      Operation sum;
      sum.count = 1;
      sum.input = sum.output = &value;
      has(error_of([&] { communicator.run(sum); }), "enough");
    }
  });
}

TEST(a_failed_collective_ends_messages) {
  run_group(2, group_options(fresh_name()), [](Communicator& communicator) {
    std::vector<float> values(20, 1.0f);
    Operation sum;
    sum.count = communicator.rank() == 0 ? 10 : 20;
    sum.input = sum.output = values.data();
    uint8_t byte = 0;
    const auto work = communicator.recv(1 - communicator.rank(), 0, &byte, 1);
    error_of([&] { communicator.run(sum); });
    CHECK(error_of([&] { work->wait(); }).kind() == ErrorKind::kUsage);
  });
}

TEST(a_close_ends_messages) {
  std::string text;
  run_group(2, group_options(fresh_name()), [&](Communicator& communicator) {
    uint8_t byte = 0;
    if (communicator.rank() == 1) {
      const auto work = communicator.recv(0, 3, &byte, 1);
      std::thread other([&] {
        std::this_thread::sleep_for(std::chrono::milliseconds(20));
        communicator.close();
      });
      has(error_of([&] { work->wait(); }), "closed");
      other.join();
      CHECK(error_of([&] { communicator.send(0, 0, &byte, 1); }).kind() == ErrorKind::kUsage);
      return;
    }
    const auto work = communicator.recv(1, 8, &byte, 1);
    const Error error = error_of([&] { work->wait(); });
    CHECK(error.kind() == ErrorKind::kPeer);
    has(error, "rank 1 (pid");
    has(error, "has closed its communicator");
  });
}

/// What was published before its sender left is received, and a sender hears what was received.
TEST(ranks_may_leave_as_soon_as_their_messages_are_complete) {
  for (int i = 0; i < scaled(20); ++i) {
    run_group(3, group_options(fresh_name()), [&](Communicator& communicator) {
      const int rank = communicator.rank();
      const size_t bytes = i % 2 == 0 ? 500 : 60000;
      if (rank == 0) {
        std::this_thread::sleep_for(std::chrono::milliseconds(i % 4 * 3));
        for (int from : {1, 2}) {
          Inbox in(bytes);
          communicator.recv(from, 0, in.data(), bytes)->wait();
          in.check(content(bytes, from, 0, 0, i));
        }
      } else {
        const auto out = content(bytes, rank, 0, 0, i);
        communicator.send(0, 0, out.data(), bytes)->wait();
      }
      communicator.close();
    });
  }
}

TEST(a_close_in_a_callback_of_a_message) {
  run_group(2, group_options(fresh_name()), [](Communicator& communicator) {
    const int peer = 1 - communicator.rank();
    uint8_t mine = 1, theirs = 0;
    const auto out = communicator.send(peer, 0, &mine, 1);
    const auto in = communicator.recv(peer, 0, &theirs, 1);
    out->wait();
    std::atomic<bool> closed{false};
    in->then([&] {
      communicator.close();
      closed.store(true);
    });
    in->wait();
    while (!closed.load()) std::this_thread::yield();
    CHECK_EQ(int{theirs}, 1);
  });
}

/// Small slots that say "not yet" half of the time.
TEST(a_transport_that_stalls) {
  setenv("DPCOMM_FAULTS", "stall=0.5", 1);
  setenv("DPCOMM_SLOT_BYTES", "4096", 1);
  check_test_tags_come_in_any_order();
  check_test_a_receive_from_any_rank_promises_each_message_once();
  check_test_random_programs();
  check_test_ranks_may_leave_as_soon_as_their_messages_are_complete();
  unsetenv("DPCOMM_FAULTS");
  unsetenv("DPCOMM_SLOT_BYTES");
}

/// No packet that is lost or changed passes for a message.
TEST(damaged_packets_are_found) {
  for (const char* fault : {"rank=0,retag=2", "rank=0,shorten=2", "rank=0,drop=2"}) {
    setenv("DPCOMM_FAULTS", fault, 1);
    run_group(2, group_options(fresh_name()), [](Communicator& communicator) {
      std::vector<std::shared_ptr<Work>> works;
      std::vector<uint8_t> buffer(30);
      for (uint32_t i = 0; i < 3; ++i) {
        works.push_back(communicator.rank() == 0 ? communicator.send(1, i, buffer.data(), 10)
                                                 : communicator.recv(0, i, &buffer[i * 10], 10));
      }
      const Error error = error_of([&] {
        for (const auto& work : works) work->wait();
      });
      CHECK(error.kind() == ErrorKind::kInternal);
      has(error, "damaged");
    });
    unsetenv("DPCOMM_FAULTS");
  }
}

}  // namespace
}  // namespace dpcomm
