// The rendezvous of a group's ranks through torch's store.
#pragma once

#include <chrono>
#include <string>
#include <torch/csrc/distributed/c10d/Store.hpp>

#include "transport/bootstrap.h"

namespace dpcomm {

/// Keys of a torch store under a prefix.
class StoreBootstrap final : public Bootstrap {
 public:
  StoreBootstrap(c10::intrusive_ptr<c10d::Store> store, std::string prefix);
  void set(const std::string& key, const std::string& value) override;
  bool get(const std::string& key, std::chrono::milliseconds timeout, std::string& value) override;

 private:
  c10::intrusive_ptr<c10d::Store> store_;
  std::string prefix_;
};

/// The prefix of a communicator's keys.
std::string store_prefix(const std::string& name);

/// A name for the communicator that the ranks of a group are about to make: the same on all of
/// them, and of no other communicator on any host. The store may be one in which groups of this
/// name met before, or failed to meet (torchrun keeps one store for all generations of a job).
///
/// Every rank asks under a number of its own that grows with each attempt, and says which process
/// it is; rank 0 waits until all ask, then answers each one's newest attempt with the name, or with
/// who is missing. Attempts that gave up are marked as answered; so are those of processes that
/// were gone before this start. Where rank 0 is missing, the first rank whose time is up answers
/// the others. Throws TimeoutError naming the ranks that did not come, or PeerError naming one that
/// died since, with the same text on all ranks. Cost: about ten requests to the store for each
/// rank, and as many every 100 ms while one waits. Source: own.
std::string agree_on_name(c10d::Store& store, int rank, int world, const std::string& group,
                          std::chrono::milliseconds timeout);

}  // namespace dpcomm
