// The heap that other processes can map (cpu/shared_heap.h).
#include "cpu/shared_heap.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iostream>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "base/error.h"
#include "check.h"
#include "cpu/host_memory.h"

namespace dpcomm {
namespace {

constexpr size_t kMiB = size_t{1} << 20;

std::byte* allocate(size_t bytes) { return static_cast<std::byte*>(SharedHeap::allocate(bytes)); }

bool all_are(const std::byte* data, size_t bytes, int value) {
  return std::all_of(data, data + bytes, [&](std::byte b) { return b == std::byte(value); });
}

uint64_t offset_of(const std::byte* data, size_t bytes) {
  const std::optional<uint64_t> offset = SharedHeap::offset_of(data, bytes);
  CHECK(offset.has_value());
  return *offset;
}

/// Memory that the heap takes, by the file itself.
size_t taken_bytes() {
  struct stat status;
  CHECK_EQ(fstat(SharedHeap::handle().fd, &status), 0);
  return static_cast<size_t>(status.st_blocks) * 512;
}

/// Runs `body` in a forked process; true if it came to its end.
bool in_child(const std::function<void()>& body) {
  std::cout.flush();
  const pid_t child = fork();
  if (child == 0) {
    alarm(60);
    body();
    std::_Exit(0);
  }
  int status = 0;
  CHECK_EQ(waitpid(child, &status, 0), child);
  return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

/// The text of the error that `body` throws; empty if it throws none.
std::string error_of(const std::function<void()>& body) {
  try {
    body();
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

bool contains(const std::string& text, const char* part) {
  return text.find(part) != std::string::npos;
}

TEST(no_heap_before_the_first_block) {
  CHECK(in_child([] {
    CHECK_EQ(SharedHeap::handle().id, 0u);
    int local = 0;
    CHECK(!SharedHeap::offset_of(&local, sizeof(local)));
    CHECK_EQ(SharedHeap::allocated_bytes(), 0u);
    SharedHeap::free(&local);
    SharedHeap::free(nullptr);
  }));
}

TEST(blocks_are_zero_aligned_and_apart) {
  std::vector<std::pair<std::byte*, size_t>> blocks;
  for (const size_t bytes : {size_t{1}, size_t{4096}, size_t{4097}, 2 * kMiB, 3 * kMiB + 5}) {
    std::byte* block = allocate(bytes);
    CHECK_EQ(reinterpret_cast<uintptr_t>(block) % (bytes >= 2 * kMiB ? 2 * kMiB : 4096), 0u);
    CHECK(all_are(block, bytes, 0));
    std::memset(block, 1 + static_cast<int>(blocks.size()), bytes);
    blocks.emplace_back(block, bytes);
  }
  for (size_t i = 0; i < blocks.size(); ++i) {
    CHECK(all_are(blocks[i].first, blocks[i].second, 1 + static_cast<int>(i)));
    SharedHeap::free(blocks[i].first);
  }
  CHECK_EQ(SharedHeap::allocated_bytes(), 0u);
}

TEST(offsets) {
  std::byte* block = allocate(3 * kMiB);
  const uint64_t start = offset_of(block, 3 * kMiB);
  CHECK(start >= 4096);
  CHECK_EQ(offset_of(block + 12345, 1), start + 12345);
  const uint64_t end = SharedHeap::handle().bytes;
  std::byte* base = block - start;
  CHECK(SharedHeap::offset_of(base + end - 1, 1).has_value());
  CHECK(!SharedHeap::offset_of(base + end - 1, 2));
  CHECK(!SharedHeap::offset_of(base - 1, 2));
  CHECK(!SharedHeap::offset_of(block, SIZE_MAX));
  CHECK(!SharedHeap::offset_of(block, SIZE_MAX - start + 1));
  CHECK(!SharedHeap::offset_of(&end, sizeof(end)));
  CHECK(!SharedHeap::offset_of(nullptr, 0));
  SharedHeap::free(block);
}

TEST(freed_memory_goes_back_and_is_zero_again) {
  const size_t before = taken_bytes();
  std::byte* block = allocate(8 * kMiB);
  CHECK(taken_bytes() >= before + 8 * kMiB);  // reserved before anyone writes
  std::memset(block, 7, 8 * kMiB);
  SharedHeap::free(block);
  CHECK_EQ(taken_bytes(), before);
  std::byte* again = allocate(8 * kMiB);
  CHECK_EQ(again, block);
  CHECK(all_are(again, 8 * kMiB, 0));
  SharedHeap::free(again);
}

TEST(free_neighbours_become_one_in_every_order) {
  std::vector<int> order{0, 1, 2, 3};
  do {
    std::byte* blocks[4];
    for (auto& block : blocks) block = allocate(4 * kMiB);
    std::byte* wall = allocate(4 * kMiB);
    for (const int i : order) SharedHeap::free(blocks[i]);
    std::byte* whole = allocate(16 * kMiB);
    CHECK_EQ(whole, blocks[0]);
    SharedHeap::free(whole);
    SharedHeap::free(wall);
  } while (std::next_permutation(order.begin(), order.end()));
}

TEST(many_threads) {
  const size_t before = taken_bytes();
  std::vector<std::thread> threads;
  for (int t = 1; t <= 4; ++t) {
    threads.emplace_back([t] {
      std::mt19937_64 random(check::seed() + t);
      std::vector<std::pair<std::byte*, size_t>> held;
      for (int i = 0; i < (check::long_run() ? 5000 : 300); ++i) {
        if (held.size() > 5 || (!held.empty() && random() % 2)) {
          const size_t which = random() % held.size();
          const auto [block, bytes] = held[which];
          CHECK(all_are(block, bytes, t));
          SharedHeap::free(block);
          held.erase(held.begin() + which);
        } else {
          const size_t bytes = 1 + random() % (random() % 8 == 0 ? 3 * kMiB : 20000);
          std::byte* block = allocate(bytes);
          CHECK(all_are(block, bytes, 0));
          std::memset(block, t, bytes);
          held.emplace_back(block, bytes);
        }
      }
      for (const auto& [block, bytes] : held) SharedHeap::free(block);
    });
  }
  for (auto& thread : threads) thread.join();
  CHECK_EQ(SharedHeap::allocated_bytes(), 0u);
  CHECK_EQ(taken_bytes(), before);
  // No part was lost: all but the first page and what alignment costs is free in one piece.
  std::byte* large = allocate(64 * kMiB);
  CHECK_EQ(offset_of(large, 1), 2 * kMiB);
  SharedHeap::free(large);
}

TEST(the_first_block_from_many_threads) {
  for (int i = 0; i < 10; ++i) {
    CHECK(in_child([] {
      std::atomic<int> missing{8};
      std::vector<std::thread> threads;
      std::byte* blocks[8];
      for (auto& block : blocks) {
        threads.emplace_back([&] {
          missing.fetch_sub(1);
          while (missing.load() > 0) std::this_thread::yield();
          block = allocate(4096);
        });
      }
      for (auto& thread : threads) thread.join();
      for (const auto& block : blocks) CHECK(SharedHeap::offset_of(block, 4096).has_value());
      CHECK_EQ(SharedHeap::allocated_bytes(), 8 * 4096u);
    }));
  }
}

TEST(a_peer_sees_all_blocks_and_only_the_heap) {
  std::byte* early = allocate(5000);
  std::memset(early, 1, 5000);
  int to_child[2], to_parent[2];
  CHECK_EQ(pipe(to_child), 0);
  CHECK_EQ(pipe(to_parent), 0);
  const HeapHandle handle = SharedHeap::handle();
  const uint64_t offset = offset_of(early, 5000);
  const pid_t owner = getpid();
  const pid_t child = fork();
  if (child == 0) {
    alarm(60);
    const PeerHeap peer(owner, handle);
    CHECK(peer.at(offset, 5000) != early);
    CHECK(all_are(peer.at(offset, 5000), 5000, 1));
    CHECK_EQ(write(to_parent[1], "r", 1), 1);
    uint64_t later;
    CHECK_EQ(read(to_child[0], &later, sizeof(later)), ssize_t{sizeof(later)});
    CHECK(all_are(peer.at(later, 3 * kMiB), 3 * kMiB, 2));
    std::memset(peer.at(later, 3 * kMiB), 3, 3 * kMiB);
    CHECK_THROWS(Error, peer.at(handle.bytes, 1));
    CHECK_THROWS(Error, peer.at(handle.bytes - 1, 2));
    CHECK_THROWS(Error, peer.at(0, 1));  // the header is no tensor
    CHECK_THROWS(Error, peer.at(UINT64_MAX, 2));
    CHECK_THROWS(Error, peer.at(offset, SIZE_MAX - offset + 1));
    std::_Exit(0);
  }
  char ready;
  CHECK_EQ(read(to_parent[0], &ready, 1), 1);
  std::byte* late = allocate(3 * kMiB);
  std::memset(late, 2, 3 * kMiB);
  const uint64_t where = offset_of(late, 3 * kMiB);
  CHECK_EQ(write(to_child[1], &where, sizeof(where)), ssize_t{sizeof(where)});
  int status;
  CHECK_EQ(waitpid(child, &status, 0), child);
  CHECK_EQ(status, 0);
  CHECK(all_are(late, 3 * kMiB, 3));
  for (const int fd : {to_child[0], to_child[1], to_parent[0], to_parent[1]}) close(fd);
  SharedHeap::free(early);
  SharedHeap::free(late);
}

TEST(handles_of_strangers_are_refused) {
  std::byte* block = allocate(1);
  const HeapHandle good = SharedHeap::handle();
  {
    const PeerHeap peer(getpid(), good);
  }
  HeapHandle wrong = good;
  wrong.id ^= 1;
  CHECK(contains(error_of([&] { PeerHeap(getpid(), wrong); }), "another heap"));
  wrong = good;
  wrong.bytes += 2 * kMiB;
  CHECK(contains(error_of([&] { PeerHeap(getpid(), wrong); }), "no heap"));
  CHECK_THROWS(Error, PeerHeap(getpid(), HeapHandle{}));
  wrong = good;
  wrong.fd = 9999;
  CHECK(contains(error_of([&] { PeerHeap(getpid(), wrong); }), "No such file"));
  int ends[2];
  CHECK_EQ(pipe(ends), 0);
  wrong.fd = ends[0];
  CHECK(contains(error_of([&] { PeerHeap(getpid(), wrong); }), "no heap"));
  close(ends[0]);
  close(ends[1]);
  // As long, but one that its owner could shorten under a reader; and one with nothing in it.
  for (const bool sealed : {false, true}) {
    const int fd = memfd_create("stranger", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    CHECK_EQ(ftruncate(fd, static_cast<off_t>(good.bytes)), 0);
    if (sealed) CHECK_EQ(fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK), 0);
    wrong.fd = fd;
    const std::string text = error_of([&] { PeerHeap(getpid(), wrong); });
    CHECK(contains(text, sealed ? "another heap" : "no heap"));
    close(fd);
  }
  SharedHeap::free(block);
}

TEST(a_forked_child_hurts_nobody) {
  std::byte* block = allocate(4 * kMiB);
  std::memset(block, 5, 4 * kMiB);
  const HeapHandle parent = SharedHeap::handle();
  const size_t taken = taken_bytes();
  CHECK(in_child([&] {
    CHECK(all_are(block, 4 * kMiB, 5));  // readable
    std::memset(block, 6, kMiB);         // and the same memory
    CHECK(!SharedHeap::offset_of(block, 4 * kMiB));
    CHECK_EQ(SharedHeap::handle().id, 0u);
    CHECK(SharedHeap::holds(block));          // not malloc's to free
    CHECK_EQ(fcntl(parent.fd, F_GETFD), -1);  // no descriptor of a heap that is not its own
    SharedHeap::free(block);
    std::byte* own = allocate(4 * kMiB);
    CHECK(own != block);
    CHECK(all_are(own, 4 * kMiB, 0));
    CHECK(SharedHeap::handle().id != parent.id);
    std::memset(own, 9, 4 * kMiB);
    SharedHeap::free(block);
    CHECK_EQ(SharedHeap::allocated_bytes(), 4 * kMiB);
    CHECK(in_child([&] {  // and so on
      CHECK(all_are(own, 4 * kMiB, 9));
      CHECK(all_are(block, kMiB, 6));
      CHECK(!SharedHeap::offset_of(own, 1));
      CHECK(SharedHeap::holds(own) && SharedHeap::holds(block));
      int local;
      CHECK(!SharedHeap::holds(&local));
      SharedHeap::free(allocate(1));
    }));
    SharedHeap::free(own);
    CHECK_EQ(SharedHeap::allocated_bytes(), 0u);
  }));
  CHECK(all_are(block, kMiB, 6));
  CHECK(all_are(block + kMiB, 3 * kMiB, 5));
  CHECK_EQ(taken_bytes(), taken);
  CHECK_EQ(SharedHeap::handle().id, parent.id);
  SharedHeap::free(block);
}

TEST(a_child_leaves_a_descriptor_alone_that_is_no_heap_any_more) {
  CHECK(in_child([] {
    SharedHeap::free(allocate(1));
    const int fd = SharedHeap::handle().fd;
    CHECK_EQ(close(fd), 0);  // as programs do that close all they have
    CHECK_EQ(dup2(1, fd), fd);
    CHECK(in_child([&] { CHECK(fcntl(fd, F_GETFD) >= 0); }));
    SharedHeap::free(allocate(3 * kMiB));  // works on: what counts is the mapping
  }));
}

TEST(limits_are_errors_that_say_what_to_do) {
  CHECK(contains(error_of([] { SharedHeap::allocate(size_t{1} << 60); }), "MiB of memory"));
  CHECK(contains(error_of([] { SharedHeap::allocate(SIZE_MAX); }), "MiB of memory"));
  const size_t left = available_memory();
  const size_t all = SharedHeap::handle().bytes - 4096;
  if (left < all) {
    CHECK(contains(error_of([&] { SharedHeap::allocate(all); }), "are left"));
  }
  CHECK_EQ(SharedHeap::allocated_bytes(), 0u);
  for (const auto& [kind, part] :
       {std::pair{RLIMIT_AS, "ulimit -v"}, std::pair{RLIMIT_FSIZE, "ulimit -f"}}) {
    CHECK(in_child([&] {
      const rlimit limit{512 * kMiB, 512 * kMiB};
      CHECK_EQ(setrlimit(kind, &limit), 0);
      CHECK(contains(error_of([] { SharedHeap::allocate(1); }), part));
      CHECK_EQ(SharedHeap::handle().id, 0u);
    }));
  }
}

/// A folder that stands for the root of the file system.
struct FakeRoot {
  std::string path;
  FakeRoot() {
    std::string pattern = (std::filesystem::temp_directory_path() / "heap-XXXXXX").string();
    CHECK(mkdtemp(pattern.data()) != nullptr);
    path = pattern;
  }
  ~FakeRoot() { std::filesystem::remove_all(path); }
  void write(const std::string& name, const std::string& text) const {
    std::filesystem::create_directories(std::filesystem::path(path + name).parent_path());
    std::ofstream(path + name) << text;
  }
};

TEST(what_the_host_has_left) {
  const FakeRoot root;
  CHECK_EQ(available_memory(root.path), SIZE_MAX);
  root.write("/proc/meminfo", "MemTotal: 9000 kB\nMemAvailable:   5000 kB\nSwapFree: 1000 kB\n");
  CHECK_EQ(available_memory(root.path), 6000u * 1024);
  root.write("/proc/self/cgroup", "0::/job/one\n");
  root.write("/sys/fs/cgroup/job/one/memory.max", "max\n");
  root.write("/sys/fs/cgroup/job/one/memory.current", "700000\n");
  CHECK_EQ(available_memory(root.path), 6000u * 1024);
  root.write("/sys/fs/cgroup/job/memory.max", "1000000\n");  // the group around it
  root.write("/sys/fs/cgroup/job/memory.current", "800000\n");
  CHECK_EQ(available_memory(root.path), 200000u);
  root.write("/sys/fs/cgroup/job/memory.stat", "anon 5\ninactive_file 50000\nactive_file 25000\n");
  CHECK_EQ(available_memory(root.path), 275000u);
  root.write("/proc/self/cgroup", "4:memory:/\n1:cpu:/x\n0::/\n");
  root.write("/sys/fs/cgroup/memory/memory.limit_in_bytes", "900000\n");
  root.write("/sys/fs/cgroup/memory/memory.usage_in_bytes", "950000\n");
  CHECK_EQ(available_memory(root.path), 0u);
  root.write("/sys/fs/cgroup/memory/memory.stat", "inactive_file 1\ntotal_inactive_file 60000\n");
  CHECK_EQ(available_memory(root.path), 10000u);
}

}  // namespace
}  // namespace dpcomm
