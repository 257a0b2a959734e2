// The CPU's paths within a host that do without channels: every rank announces where its tensor
// lies, and the others reduce and read it there.
//
// An operation begins with the arrival of all ranks on the board (transport/board.h); what they
// offer decides, alike on all of them, how it goes on:
//
//   small        every rank has put its contribution into the arrival or into a slot, and each
//   reads
//                all. No second meeting: slots change by parity.
//   zero copy    all tensors lie in shared heaps: each rank reduces its part from all inputs
//   straight
//                into all outputs; one meeting more.
//   single copy  each rank reads the others' contributions to its part into a scratch in its cache
//                (process_vm_readv), reduces into its own output, and reads the other parts from
//                the others' outputs; two meetings more.
//   bounce       private tensors otherwise: chunks through buffers that all ranks
//                map, the next one copied in before this one is reduced; the own part is never
//                copied.
//
// They implement one_shot (small) and two_shot (the others) of schedule/, and direct for the rest:
// all sum in the order of ranks in the accumulation type and round once, so that the bits do not
// depend on the path.
//
// For 2 ranks and S bytes, zero copy moves 4 S through memory (2 S read, 2 S written, over both),
// which is the least that an all-reduce can; so does bounce in place, as long as the buffers stay
// in the caches. Where single copy begins is measured (DPCOMM_SINGLE_COPY_BYTES, docs/adr/0005).
// Source: own; single copy is what CMA does in MPI libraries (Chakraborty et al. 2017).
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "cpu/blocks.h"
#include "cpu/operation_watch.h"
#include "cpu/progress.h"
#include "cpu/reduction.h"
#include "cpu/shared_heap.h"
#include "cpu/task.h"
#include "transport/board.h"
#include "transport/channel.h"

namespace dpcomm {

/// How an operation on the CPU is run.
enum class Path : uint8_t {
  kChannels,  ///< steps of its schedule over channels (executor.h)
  kSmall,
  kLarge,  ///< zero copy, single copy or bounce
};
inline constexpr int kPaths = 3;
constexpr const char* name(Path path) {
  constexpr const char* kNames[kPaths] = {"channels", "small", "large"};
  return kNames[static_cast<int>(path)];
}

/// What a path may be chosen by: the same on all ranks.
struct HostFacts {
  int world = 1;
  size_t slot_bytes = 0;  ///< of a board's slot; 0: there is no board
  Reach reach = Reach::kNone;
};

/// The path of an operation in its native wire format whose algorithm is `auto`. `count` as in
/// Operation.
Path choose_path(Collective collective, size_t count, size_t elem_bytes, bool unequal,
                 const HostFacts& host);

class LocalPaths {
 public:
  /// As Executor's. Where the transport has no board, there is nothing to run.
  LocalPaths(Transport& transport, const WaitPolicy& policy, const std::atomic<bool>& interrupted);
  ~LocalPaths();

  HostFacts facts() const;

  /// Runs the task to its end on this rank. Throws as Executor::run() does; after a throw nothing
  /// more is published.
  void run(const Task& task, Path path);

  uint64_t wire_bytes() const { return wire_bytes_; }  ///< read from others, or pushed to them
  uint64_t wait_ns() const { return wait_ns_; }

 private:
  struct Part {
    size_t first = 0;  ///< bytes
    size_t bytes = 0;
  };

  // Meeting.
  void arrive(Where where);
  void meet();                ///< waits for the arrival of all
  void meet_at(int counter);  ///< counts, and waits until all have
  void count(int counter);
  void wait_for(int counter);
  template <class Ready>
  void wait(int rank, Ready ready);

  // The small path.
  void run_small();
  bool offer_tensor();
  void stage_input();
  const std::byte* staged(int rank) const;
  void finish_small();

  // The large path.
  void run_large();
  void introduce_heaps();
  bool all_in_heaps();
  void push();
  void pull();
  Part chunk_of(size_t i) const;
  void copy_in(size_t i);
  void bounce();
  void reduce_chunk(size_t i);
  void move_blocks();
  size_t own_input_bytes() const;
  void write_portions();
  void exchange_portions();
  Part part_of(int rank, size_t bytes) const;
  /// Bytes of a rank's input (output): where they can be read here, or copied by read().
  const std::byte* mapped_input(int rank, size_t first, size_t bytes) const;
  std::byte* mapped_output(int rank, size_t first, size_t bytes) const;
  void read(int rank, uint64_t address, void* to, size_t bytes);
  void read_input(int rank, size_t first, void* to, size_t bytes);
  void reduce_block(size_t first, size_t bytes, std::byte* to);

  Transport& transport_;
  Board* const board_;
  const WaitPolicy policy_;
  const WaitPolicy patient_policy_;
  OperationWatch watch_;
  const std::atomic<bool>& interrupted_;
  const int rank_;
  const int world_;
  const int quick_looks_;  // before a wait asks for the time
  const StreamCopy copy_streaming_;
  Reduction reduction_;
  const size_t single_copy_bytes_;

  // Of the task that runs.
  const Task* task_ = nullptr;
  size_t elem_bytes_ = 0;
  size_t input_bytes_ = 0, output_bytes_ = 0;
  uint32_t tag_ = 0;
  uint64_t epoch_ = 0;
  uint64_t counts_[BoardLayout::kCounters] = {};
  uint64_t chunks_ = 0;  // that went through the bounce buffers
  Blocks blocks_;
  bool mapped_ = false;  // all tensors lie in heaps
  std::vector<Location> locations_;

  struct Heap {
    uint64_t id = 0;      ///< of the peer's heap that was tried last; the same on all ranks
    bool shared = false;  ///< all ranks have mapped it
    std::unique_ptr<PeerHeap> memory;  ///< null for one of this process
  };
  std::vector<Heap> heaps_;

  std::vector<std::byte> scratch_;
  std::vector<const std::byte*> sources_;
  std::vector<std::byte*> destinations_;
  uint64_t wire_bytes_ = 0;
  uint64_t wait_ns_ = 0;
};

}  // namespace dpcomm
