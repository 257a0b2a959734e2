// A group of ranks as threads, and what the result of a collective on exact inputs has to be.
#pragma once

#include <algorithm>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "comm/communicator.h"
#include "cpu/shared_heap.h"
#include "schedule/registry.h"

namespace dpcomm {

/// inproc needs no store: the ranks meet by the group's name.
class NoBootstrap final : public Bootstrap {
 public:
  void set(const std::string&, const std::string&) override {}
  bool get(const std::string&, std::chrono::milliseconds, std::string&) override { return false; }
};

inline CommunicatorOptions group_options(const std::string& name) {
  CommunicatorOptions options = CommunicatorOptions::from_environment();
  options.transport = "inproc";
  options.name = name;
  options.timeout = std::chrono::milliseconds(30000);
  options.wire_on_all_links = true;
  return options;
}

using RankBody = std::function<void(Communicator&)>;

/// Runs body(communicator) in a thread per rank of a fresh group.
inline void run_group(int world, const CommunicatorOptions& options, const RankBody& body) {
  std::vector<std::thread> ranks;
  for (int rank = 0; rank < world; ++rank) {
    ranks.emplace_back([&, rank] {
      NoBootstrap bootstrap;
      try {
        const auto communicator = Communicator::create(rank, world, bootstrap, options);
        body(*communicator);
      } catch (const std::exception& error) {
        check::fail(__FILE__, __LINE__, "rank " + std::to_string(rank) + ": " + error.what());
      }
    });
  }
  for (std::thread& rank : ranks) rank.join();
}

inline std::string fresh_name() {
  static std::atomic<int> number{0};
  return "group" + std::to_string(number.fetch_add(1));
}

/// Of the heap that other ranks map (cpu/shared_heap.h), or ordinary memory.
template <class T>
struct HeapAllocator {
  using value_type = T;
  using propagate_on_container_move_assignment = std::true_type;
  using propagate_on_container_copy_assignment = std::true_type;
  bool in_heap = false;

  T* allocate(size_t n) {
    if (in_heap) return static_cast<T*>(SharedHeap::allocate(n * sizeof(T)));
    return std::allocator<T>().allocate(n);
  }
  void deallocate(T* data, size_t n) {
    in_heap ? SharedHeap::free(data) : std::allocator<T>().deallocate(data, n);
  }
  bool operator==(const HeapAllocator& other) const { return in_heap == other.in_heap; }
};

/// Which of a trial's tensors lie in the shared heap.
struct InHeap {
  bool input = false;
  bool output = false;
};

/// One collective on small integers, exact in every dtype and wire format: contributions, outputs
/// that start poisoned between guards, and the comparison. The `counts` of an
/// operation are those of all ranks; of an all-to-all size_of() has them instead.
class Trial {
 public:
  static constexpr size_t kGuard = 64;

  Trial(Operation operation, int rank, int world, int salt, bool in_place, InHeap in_heap = {})
      : operation_(operation), rank_(rank), world_(world), salt_(salt), in_place_(in_place) {
    if (operation_.collective == Collective::kAllToAll) in_place_ = false;
    has_input_ = has_input(operation.collective, rank, operation.root);
    has_output_ = has_output(operation.collective, rank, operation.root);
    if (unequal() && operation_.collective == Collective::kAllToAll) {
      operation_.recv_counts.resize(operation_.counts.size());
      for (int other = 0; other < world; ++other) {
        operation_.counts[other] = size_of(rank, other);
        operation_.recv_counts[other] = size_of(other, rank);
      }
    }
    const size_t elem = size_bytes(operation.dtype);
    input_ = Buffer(input_elems() * elem, in_heap.input);
    output_ = Buffer(output_elems() * elem, in_heap.output);
    for (size_t i = 0; i < input_elems(); ++i) put(input_.data(), i, contribution(rank, i));
    input_before_.assign(input_.bytes.begin(), input_.bytes.end());
    std::memset(output_.data(), 0xa5, output_elems() * elem);
    if (operation.collective == Collective::kBroadcast) {
      in_place_ = true;
      if (operation.root == rank) output_.bytes = input_.bytes;
    }
    if (!has_input_ && operation.collective != Collective::kBroadcast) in_place_ = false;
    prepare(elem);
  }

  const Operation& operation() const { return operation_; }
  size_t output_elems() const {
    return gathers()    ? total()
           : pairs()    ? received()
           : is_split() ? block(rank_)
                        : operation_.count;
  }

  /// What a caller may do as soon as the operation has returned: writes over both tensors. check()
  /// looks at a copy made before if `looks`, else at nothing but the guards.
  void reuse(bool looks) {
    const size_t elem = size_bytes(operation_.dtype);
    const auto* at = static_cast<const std::byte*>(operation_.output);
    if (looks && has_output_) result_.assign(at, at + output_elems() * elem);
    std::memset(output_.data(), 0xee, output_elems() * elem);
    std::memset(input_.data(), 0xee, input_elems() * elem);
    reused_ = true;
  }

  void check() const {
    CHECK(input_.guards_hold());
    CHECK(output_.guards_hold());
    if (!reused_ && (!has_output_ || !in_place_)) {
      CHECK(std::equal(input_before_.begin(), input_before_.end(), input_.bytes.begin()));
    }
    if (!has_output_ || (reused_ && result_.empty())) return;
    const auto* at = reused_ ? result_.data() : static_cast<const std::byte*>(operation_.output);
    for (size_t i = 0; i < output_elems(); ++i) CHECK_EQ(get(at, i), expected(i));
  }

 private:
  struct Buffer {
    std::vector<std::byte, HeapAllocator<std::byte>> bytes;
    Buffer() = default;
    Buffer(size_t payload, bool in_heap)
        : bytes(payload + 2 * kGuard, std::byte{0x5a}, HeapAllocator<std::byte>{in_heap}) {}
    std::byte* data() { return bytes.data() + kGuard; }
    bool guards_hold() const {
      for (size_t i = 0; i < kGuard; ++i) {
        if (bytes[i] != std::byte{0x5a} || bytes[bytes.size() - 1 - i] != std::byte{0x5a}) {
          return false;
        }
      }
      return true;
    }
  };

  bool unequal() const { return !operation_.counts.empty(); }
  bool pairs() const { return operation_.collective == Collective::kAllToAll; }
  bool gathers() const {
    return operation_.collective == Collective::kAllGather ||
           operation_.collective == Collective::kGather;
  }
  bool scatters() const {
    return operation_.collective == Collective::kReduceScatter ||
           operation_.collective == Collective::kScatter;
  }
  bool is_split() const { return gathers() || scatters(); }

  /// Elements of a rank's block, and of all before it.
  size_t block(int rank) const { return unequal() ? operation_.counts[rank] : operation_.count; }
  size_t first(int rank) const {
    size_t sum = 0;
    for (int before = 0; before < rank; ++before) sum += block(before);
    return sum;
  }
  size_t total() const { return first(world_); }
  /// Of an all-to-all: what rank `source` sends to rank `destination`, some of it nothing.
  size_t size_of(int source, int destination) const {
    if (!unequal()) return operation_.count;
    const size_t most = operation_.count;
    const size_t sizes[] = {most, 0, most / 2, 1, most / 3};
    return sizes[(source * 3 + destination + salt_) % 5];
  }
  size_t received() const {
    size_t sum = 0;
    for (int source = 0; source < world_; ++source) sum += size_of(source, rank_);
    return sum;
  }
  size_t input_elems() const {
    return scatters() || pairs() ? total() : gathers() ? block(rank_) : operation_.count;
  }

  void prepare(size_t elem) {
    operation_.input = has_input_ || in_place_ ? input_.data() : nullptr;
    operation_.output = has_output_ ? output_.data() : nullptr;
    const size_t own = first(rank_) * elem;
    if (!in_place_) return;
    if (gathers()) {
      if (!has_output_) return;
      std::memcpy(output_.data() + own, input_.data(), block(rank_) * elem);
      operation_.input = output_.data() + own;
    } else if (scatters()) {
      operation_.output = input_.data() + own;
    } else if (operation_.collective == Collective::kBroadcast) {
      operation_.input = output_.data();
    } else if (has_output_) {
      operation_.output = input_.data();
    }
  }

  /// 0, 1 or 2: sums over 9 ranks stay exact in every format, and products small.
  int contribution(int rank, size_t i) const {
    return static_cast<int>((i * 7 + rank * 5 + salt_ + i / 11) % 3);
  }

  /// Of element i of this rank's output.
  int expected(size_t i) const {
    if (operation_.collective == Collective::kBroadcast) return contribution(operation_.root, i);
    if (gathers()) {
      int source = 0;
      while (i >= block(source)) i -= block(source++);
      return contribution(source, i);
    }
    if (pairs()) {
      int source = 0;
      for (; i >= size_of(source, rank_); ++source) i -= size_of(source, rank_);
      for (int before = 0; before < rank_; ++before) i += size_of(source, before);
      return contribution(source, i);
    }
    if (scatters()) i += first(rank_);
    if (operation_.collective == Collective::kScatter) return contribution(operation_.root, i);
    int sum = contribution(0, i);
    for (int rank = 1; rank < world_; ++rank) {
      const int other = contribution(rank, i);
      if (operation_.op == ReduceOp::kMax) {
        sum = std::max(sum, other);
      } else if (operation_.op == ReduceOp::kProduct) {
        sum *= other;
      } else {
        sum += other;
      }
    }
    return sum;
  }

  void put(std::byte* base, size_t i, int value) const {
    switch (operation_.dtype) {
      case Dtype::kFloat32:
        return put_as(base, i, static_cast<float>(value));
      case Dtype::kFloat64:
        return put_as(base, i, static_cast<double>(value));
      case Dtype::kInt64:
        return put_as(base, i, static_cast<int64_t>(value));
      case Dtype::kInt8:
        return put_as(base, i, static_cast<int8_t>(value));
      case Dtype::kBFloat16: {
        const auto wide = static_cast<float>(value);
        uint32_t bits;
        std::memcpy(&bits, &wide, sizeof(bits));
        return put_as(base, i, static_cast<uint16_t>(bits >> 16));
      }
      default:
        check::fail(__FILE__, __LINE__, "a dtype that Trial does not know");
    }
  }

  int get(const std::byte* base, size_t i) const {
    switch (operation_.dtype) {
      case Dtype::kFloat32:
        return static_cast<int>(get_as<float>(base, i));
      case Dtype::kFloat64:
        return static_cast<int>(get_as<double>(base, i));
      case Dtype::kInt64:
        return static_cast<int>(get_as<int64_t>(base, i));
      case Dtype::kInt8:
        return get_as<int8_t>(base, i);
      case Dtype::kBFloat16: {
        const uint32_t bits = uint32_t{get_as<uint16_t>(base, i)} << 16;
        float wide;
        std::memcpy(&wide, &bits, sizeof(wide));
        return static_cast<int>(wide);
      }
      default:
        check::fail(__FILE__, __LINE__, "a dtype that Trial does not know");
    }
  }

  template <class T>
  static void put_as(std::byte* base, size_t i, T value) {
    std::memcpy(base + i * sizeof(T), &value, sizeof(T));
  }
  template <class T>
  static T get_as(const std::byte* base, size_t i) {
    T value;
    std::memcpy(&value, base + i * sizeof(T), sizeof(T));
    return value;
  }

  Operation operation_;
  int rank_, world_, salt_;
  bool in_place_;
  bool has_input_ = true;
  bool has_output_ = true;
  Buffer input_, output_;
  std::vector<std::byte> input_before_;
  std::vector<std::byte> result_;  // of one whose tensors are written over
  bool reused_ = false;
};

/// The operations that a group runs in a test of everything: each algorithm of each collective.
inline std::vector<Operation> every_algorithm() {
  std::vector<Operation> operations;
  for (const AlgorithmInfo& algorithm : kAlgorithms) {
    Operation operation;
    operation.collective = algorithm.collective;
    operation.algorithm = algorithm.name;
    operations.push_back(operation);
  }
  Operation automatic;
  automatic.algorithm = "auto";
  operations.push_back(automatic);
  return operations;
}

/// Those of them that take blocks of unequal size, with such blocks of at most `most` elements,
/// some of them empty.
inline std::vector<Operation> every_unequal(int world, size_t most, int salt) {
  std::vector<Operation> operations;
  for (Operation operation : every_algorithm()) {
    if (!has_blocks(operation.collective)) continue;
    operation.count = most;
    const size_t sizes[] = {most / 2, 0, most, 1, most / 3};
    for (int rank = 0; rank < world; ++rank) operation.counts.push_back(sizes[(rank + salt) % 5]);
    operations.push_back(operation);
  }
  return operations;
}

}  // namespace dpcomm
