// Why an operation does not come to its end, from what the ranks say of themselves.
#pragma once

#include <string>
#include <vector>

#include "transport/channel.h"

namespace dpcomm {

/// "all_reduce #12 (1000 x float32, sum, two_shot)". Takes any record: it may come from memory that
/// something else has written to.
std::string describe(const OpRecord& record);

/// What all ranks have to agree on, as a number; never 0.
uint32_t fingerprint(const OpRecord& record);

/// "a; b; c".
std::string joined(const std::vector<std::string>& parts, const char* separator);

/// Of the operations of one place (transport/channel.h). From any thread.
class Diagnosis {
 public:
  Diagnosis(const Transport& transport, Place place) : transport_(transport), place_(place) {}

  /// Throws UsageError if a rank has called another operation than this one in the same place of
  /// the order, now or a few operations ago: a broadcast's root, for one, returns before anybody
  /// can object.
  void check_disagreement(const OpRecord& operation) const;
  /// Throws PeerError if a rank is gone that has not finished this operation, whether or not it is
  /// the one that this rank waits for: nobody can finish an operation with it, and in a chain of
  /// ranks that wait for each other the end may be busy elsewhere. What a rank finished before it
  /// went is all there.
  void check_peers(const OpRecord& operation) const;
  /// Throws what ends the operation where this rank closes its communicator with it in flight: what
  /// the two above find, so that a death is told as one, or else a PeerError that says so.
  [[noreturn]] void leave(const OpRecord& operation) const;
  /// What a rank did last: "in all_reduce #7 (...), finished last: barrier #6".
  std::string history(int rank) const;
  /// How all ranks stand to the operation, one line for each, with what each finished last; begins
  /// with a newline:
  ///   rank 0 (pid 4709, host node1): arrived; in all_reduce #12 (...), finished last: barrier #11
  std::string report(const OpRecord& operation) const;
  /// The ranks that have not called the operation; empty if all have.
  std::string not_called(const OpRecord& operation) const;
  /// The ranks that are in it and have not shown for a while that they run; empty if there is none.
  std::string not_moving(const OpRecord& operation) const;
  std::string describe_rank(int rank) const { return transport_.describe(rank); }

 private:
  const Transport& transport_;
  const Place place_;
};

}  // namespace dpcomm
