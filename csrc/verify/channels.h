// Channels of a symbolic execution: bounded queues of values between ranks.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "verify/plan.h"
#include "verify/values.h"

namespace dpcomm {

/// All channels (source, destination, lane) of a plan, each a first-in first-out queue of at most
/// `slots` values.
class Channels {
 public:
  using Index = size_t;

  Channels(const Plan& plan, int slots) : world_(plan.world), slots_(slots) {
    int last = 0;
    first_lane_ = 255;
    for (const Phase& phase : plan.phases) {
      const AlgorithmInfo& info = phase.info();
      first_lane_ = std::min(first_lane_, info.first_lane);
      last = std::max(last, info.first_lane + info.channel_lanes);
    }
    lanes_ = std::max(0, last - first_lane_);
    queues_.resize(static_cast<size_t>(lanes_) * world_ * world_);
  }

  size_t size() const { return queues_.size(); }
  bool has_lane(int lane) const { return lane >= first_lane_ && lane < first_lane_ + lanes_; }
  Index index(int source, int destination, int lane) const {
    return (static_cast<size_t>(lane - first_lane_) * world_ + source) * world_ + destination;
  }
  int source(Index i) const { return static_cast<int>(i / world_ % world_); }
  int destination(Index i) const { return static_cast<int>(i % world_); }
  int lane(Index i) const { return static_cast<int>(i / world_ / world_) + first_lane_; }

  bool empty(Index i) const { return queues_[i].count == 0; }
  bool full(Index i) const { return queues_[i].count >= slots_; }
  int count(Index i) const { return queues_[i].count; }
  Values::Id front(Index i) const { return nodes_[queues_[i].head].value; }

  void push(Index i, Values::Id value) {
    int32_t at;
    if (free_.empty()) {
      at = static_cast<int32_t>(nodes_.size());
      nodes_.emplace_back();
    } else {
      at = free_.back();
      free_.pop_back();
    }
    nodes_[at] = Node{value, -1};
    Queue& queue = queues_[i];
    if (queue.count++ == 0) {
      queue.head = at;
    } else {
      nodes_[queue.tail].next = at;
    }
    queue.tail = at;
  }
  Values::Id pop(Index i) {
    Queue& queue = queues_[i];
    const int32_t at = queue.head;
    queue.head = nodes_[at].next;
    --queue.count;
    free_.push_back(at);
    return nodes_[at].value;
  }

 private:
  struct Node {
    Values::Id value = 0;
    int32_t next = -1;
  };
  struct Queue {
    int32_t head = -1;
    int32_t tail = -1;
    int32_t count = 0;
  };

  int world_;
  int slots_;
  int first_lane_ = 0;
  int lanes_ = 0;
  std::vector<Queue> queues_;
  std::vector<Node> nodes_;
  std::vector<int32_t> free_;
};

}  // namespace dpcomm
