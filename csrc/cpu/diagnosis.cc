#include "cpu/diagnosis.h"

#include <algorithm>
#include <cstring>

#include "base/clock.h"
#include "base/dtype.h"
#include "base/error.h"
#include "base/reduce_op.h"
#include "schedule/registry.h"
#include "wire/wire_format.h"

namespace dpcomm {
namespace {

// A rank that waits shows every 50 ms that it runs; one that has not for so long is busy elsewhere
// or stopped. Generous, because the machine may be overloaded.
constexpr int64_t kStillNs = 500'000'000;

/// The name of an enumeration's value, or "<what> <number>" for a number that is none.
template <class Enumeration>
std::string name_of(uint8_t value, int count, const char* what) {
  return value < count ? name(static_cast<Enumeration>(value)) : str(what, " ", int{value});
}

std::string algorithm_name(uint8_t index) {
  return index < kAlgorithmCount ? kAlgorithms[index].name : str("algorithm ", int{index});
}

}  // namespace

std::string joined(const std::vector<std::string>& parts, const char* separator) {
  std::string text;
  for (const std::string& part : parts) text += (text.empty() ? "" : separator) + part;
  return text;
}

std::string describe(const OpRecord& record) {
  const auto collective = static_cast<Collective>(record.collective);
  std::string text = str(name_of<Collective>(record.collective, kCollectives, "collective"), " #",
                         record.sequence);
  if (collective == Collective::kBarrier) return text;
  text += str(" (", record.count, " x ", name_of<Dtype>(record.dtype, kDtypes, "dtype"));
  if (record.blocks != 0) text += str(" in unequal blocks, digest ", record.blocks);
  if (reduces(collective)) text += ", " + name_of<ReduceOp>(record.op, kReduceOps, "operator");
  if (record.op == static_cast<uint8_t>(ReduceOp::kPremulSum)) text += str(" ", record.factor);
  if (is_rooted(collective)) {
    text += str(", root ", record.root);
  }
  text += ", " + algorithm_name(record.algorithm);
  if (static_cast<WireFormat>(record.wire) != WireFormat::kNative) {
    text += ", wire " + name_of<WireFormat>(record.wire, kWireFormats, "format");
  }
  return text + ")";
}

uint32_t fingerprint(const OpRecord& record) {
  OpRecord agreed = record;
  agreed.finished = 0;
  agreed.alive_ns = 0;
  agreed.stage = 0;
  // Each pair of ranks has a number of its own; their messages carry it.
  if (agreed.collective == static_cast<uint8_t>(Collective::kAllToAll)) agreed.count = 0;
  uint64_t words[sizeof(OpRecord) / sizeof(uint64_t)];
  static_assert(sizeof(words) == sizeof(agreed));
  std::memcpy(words, &agreed, sizeof(words));
  uint64_t hash = 0;
  for (const uint64_t word : words) {  // splitmix64's finaliser over a running sum
    hash += word + 0x9e3779b97f4a7c15u;
    hash = (hash ^ (hash >> 30)) * 0xbf58476d1ce4e5b9u;
    hash = (hash ^ (hash >> 27)) * 0x94d049bb133111ebu;
    hash ^= hash >> 31;
  }
  const auto tag = static_cast<uint32_t>(hash ^ (hash >> 32));
  return tag == 0 ? 1 : tag;
}

void Diagnosis::check_disagreement(const OpRecord& operation) const {
  const int rank = transport_.rank();
  const uint64_t now = operation.sequence;
  for (uint64_t back = std::min(now, kKeptOperations); back-- > 0;) {  // the oldest first
    const uint64_t sequence = now - back;
    const OpRecord mine = transport_.announced_at(rank, sequence, place_);
    if (mine.sequence == 0) continue;
    for (int peer = 0; peer < transport_.world(); ++peer) {
      const OpRecord other = transport_.announced_at(peer, sequence, place_);
      if (other.sequence == 0 || fingerprint(other) == fingerprint(mine)) continue;
      const bool first = rank < peer;  // the same text from both
      throw usage_error("ranks disagree: ", transport_.describe(first ? rank : peer), " called ",
                        describe(first ? mine : other), ", but ",
                        transport_.describe(first ? peer : rank), " called ",
                        describe(first ? other : mine), report(mine));
    }
  }
}

std::string Diagnosis::history(int peer) const {
  const OpRecord last = transport_.announced(peer, place_);
  if (last.sequence == 0) return "no operation yet";
  if (last.finished == last.sequence) return "finished last: " + describe(last);
  const OpRecord finished = transport_.announced_at(peer, last.finished, place_);
  return str("in ", describe(last), ", finished last: ",
             finished.sequence > 0 ? describe(finished) : std::string("nothing"));
}

void Diagnosis::check_peers(const OpRecord& operation) const {
  std::vector<std::string> gone;
  for (int peer = 0; peer < transport_.world(); ++peer) {
    if (peer == transport_.rank()) continue;
    const PeerState state = transport_.peer_state(peer);
    if (state == PeerState::kAlive) continue;
    if (transport_.announced(peer, place_).finished >= operation.sequence) continue;
    const bool closed = state == PeerState::kClosed;
    gone.push_back(str(transport_.describe(peer), closed ? " has closed its communicator" : " died",
                       " (", history(peer), ")"));
  }
  if (gone.empty()) return;
  throw peer_error(joined(gone, "; "), "; noticed by ", transport_.describe(transport_.rank()),
                   " in ", describe(operation), report(operation));
}

void Diagnosis::leave(const OpRecord& operation) const {
  check_disagreement(operation);
  check_peers(operation);
  throw peer_error(transport_.describe(transport_.rank()), " has closed its communicator with ",
                   describe(operation), " in flight", report(operation));
}

std::string Diagnosis::report(const OpRecord& operation) const {
  std::string text;
  for (int peer = 0; peer < transport_.world(); ++peer) {
    const uint64_t last = transport_.announced(peer, place_).sequence;
    const PeerState state = transport_.peer_state(peer);
    text += str("\n  ", transport_.describe(peer), ": ",
                last < operation.sequence ? "did not arrive" : "arrived",
                state == PeerState::kDead     ? ", died"
                : state == PeerState::kClosed ? ", closed"
                                              : "",
                "; ", history(peer));
  }
  return text;
}

std::string Diagnosis::not_called(const OpRecord& operation) const {
  std::vector<std::string> missing;
  for (int peer = 0; peer < transport_.world(); ++peer) {
    if (peer == transport_.rank() ||
        transport_.announced(peer, place_).sequence >= operation.sequence)
      continue;
    missing.push_back(str(transport_.describe(peer), " has not called it (", history(peer), ")"));
  }
  return joined(missing, "; ");
}

std::string Diagnosis::not_moving(const OpRecord& operation) const {
  std::vector<std::string> still;
  for (int peer = 0; peer < transport_.world(); ++peer) {
    const OpRecord other = transport_.announced(peer, place_);
    const int64_t silence_ns = elapsed_ns(other.alive_ns);
    if (peer == transport_.rank() || other.finished >= operation.sequence || silence_ns < kStillNs)
      continue;
    still.push_back(str(transport_.describe(peer), " has given no sign of life for ",
                        silence_ns / 100'000'000 / 10.0, " s (", history(peer), ")"));
  }
  return joined(still, "; ");
}

}  // namespace dpcomm
