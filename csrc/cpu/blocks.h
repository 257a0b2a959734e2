// Where the blocks of an operation lie in its input and output, of equal size or not.
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

#include "schedule/collective.h"

namespace dpcomm {

/// A chunk of a schedule as a part of the tensors of this rank, in elements.
struct Block {
  size_t count = 0;
  size_t in_input = 0;   ///< its first element, where this rank has it in its input
  size_t in_output = 0;  ///< likewise of its output
};

class Blocks {
 public:
  /// Blocks of `count` elements each (of a tensor that is not blocked: all of it), or, where
  /// `counts` is not empty, of unequal size: of each rank's block alike on all ranks, or, of an
  /// all-to-all, `counts` to and `recv_counts` from each rank.
  void reset(Collective collective, int rank, int world, size_t count,
             const std::vector<size_t>& counts, const std::vector<size_t>& recv_counts) {
    collective_ = collective;
    rank_ = rank;
    world_ = world;
    count_ = count;
    counts_ = counts.empty() ? nullptr : &counts;
    recv_counts_ = collective == Collective::kAllToAll ? &recv_counts : &counts;
    if (counts_ == nullptr) return;
    first_ = sums(counts);
    recv_first_ = collective == Collective::kAllToAll ? sums(recv_counts) : first_;
  }

  bool unequal() const { return counts_ != nullptr; }

  /// Elements of the largest block that this rank sends or receives.
  size_t largest() const {
    if (!unequal()) return count_;
    return std::max(*std::max_element(counts_->begin(), counts_->end()),
                    *std::max_element(recv_counts_->begin(), recv_counts_->end()));
  }

  Block of(int chunk) const {
    switch (collective_) {
      case Collective::kAllGather:
      case Collective::kGather:
        return Block{count(chunk), 0, first(chunk)};
      case Collective::kReduceScatter:
      case Collective::kScatter:
        return Block{count(chunk), first(chunk), 0};
      case Collective::kAllToAll: {
        const int source = chunk / world_, destination = chunk % world_;
        const size_t size = !unequal()        ? count_
                            : source == rank_ ? (*counts_)[destination]
                                              : (*recv_counts_)[source];
        return Block{size, first(destination), unequal() ? recv_first_[source] : source * count_};
      }
      default:
        return Block{count_, 0, 0};
    }
  }

 private:
  size_t count(int block) const { return unequal() ? (*counts_)[block] : count_; }
  size_t first(int block) const { return unequal() ? first_[block] : block * count_; }

  static std::vector<size_t> sums(const std::vector<size_t>& counts) {
    std::vector<size_t> first;
    first.reserve(counts.size());
    size_t sum = 0;
    for (const size_t count : counts) {
      first.push_back(sum);
      sum += count;
    }
    return first;
  }

  Collective collective_ = Collective::kAllReduce;
  int rank_ = 0, world_ = 1;
  size_t count_ = 0;
  const std::vector<size_t>* counts_ = nullptr;  ///< null: blocks of equal size
  const std::vector<size_t>* recv_counts_ = nullptr;
  std::vector<size_t> first_, recv_first_;
};

}  // namespace dpcomm
