#include "comm/operation.h"

#include <algorithm>
#include <numeric>

#include "base/error.h"

namespace dpcomm {
namespace {

/// Elements of the buffers of this rank, and where its own block begins in the larger one.
struct Extents {
  size_t input = 0;
  size_t output = 0;
  size_t own = 0;
};

size_t sum(const std::vector<size_t>& counts) {
  return std::accumulate(counts.begin(), counts.end(), size_t{0});
}

bool alike(const std::vector<size_t>& counts) {
  return std::all_of(counts.begin(), counts.end(), [&](size_t each) { return each == counts[0]; });
}

Extents extents_of(const Operation& operation, int rank, int world) {
  const std::vector<size_t>& counts = operation.counts;
  const bool equal = counts.empty();
  const size_t block = equal ? operation.count : counts[rank];
  const size_t all = equal ? operation.count * world : sum(counts);
  const size_t own = equal ? operation.count * rank
                           : std::accumulate(counts.begin(), counts.begin() + rank, size_t{0});
  switch (operation.collective) {
    case Collective::kBarrier:
      return Extents{};
    case Collective::kAllGather:
    case Collective::kGather:
      return Extents{block, all, own};
    case Collective::kReduceScatter:
    case Collective::kScatter:
      return Extents{all, block, own};
    case Collective::kAllToAll:
      return Extents{all, equal ? all : sum(operation.recv_counts), 0};
    default:
      return Extents{operation.count, operation.count, 0};
  }
}

/// Throws UsageError unless there is a count for each rank, and all of them fit into memory.
void check_list(const char* collective, const char* what, const std::vector<size_t>& counts,
                size_t elem, int world) {
  if (counts.size() != static_cast<size_t>(world)) {
    throw usage_error(collective, ": ", counts.size(), " ", what, " for ", world, " ranks");
  }
  size_t left = SIZE_MAX / elem;
  for (const size_t count : counts) {
    if (count > left) throw usage_error(collective, ": ", what, " are more than memory can hold");
    left -= count;
  }
}

void check_counts(const Operation& operation, int rank, int world) {
  const char* const collective = name(operation.collective);
  const size_t elem = size_bytes(operation.dtype);
  const bool pairs = operation.collective == Collective::kAllToAll;
  if (operation.count > SIZE_MAX / elem / world) {
    throw usage_error(collective, ": ", operation.count, " elements are more than memory can hold");
  }
  if (operation.counts.empty()) {
    if (!operation.recv_counts.empty()) throw usage_error(collective, ": recv_counts alone");
    return;
  }
  if (!has_blocks(operation.collective)) {
    throw usage_error(collective, ": counts are for what moves blocks");
  }
  check_list(collective, "counts", operation.counts, elem, world);
  if (!pairs) {
    if (operation.recv_counts.empty()) return;
    throw usage_error(collective, ": recv_counts are of an all_to_all");
  }
  check_list(collective, "recv_counts", operation.recv_counts, elem, world);
  const size_t sent = operation.counts[rank], received = operation.recv_counts[rank];
  if (sent != received) {
    throw usage_error(collective, ": rank ", rank, " sends ", sent, " elements to itself and ",
                      "receives ", received);
  }
}

bool overlap(const std::byte* a, size_t a_bytes, const std::byte* b, size_t b_bytes) {
  return a_bytes > 0 && b_bytes > 0 && a < b + b_bytes && b < a + a_bytes;
}

/// Input and output are the same (of what moves blocks: the own block), or apart.
void check_buffers(const Operation& operation, int rank, int world) {
  const Collective collective = operation.collective;
  const Extents extents = extents_of(operation, rank, world);
  const bool needs_input = has_input(collective, rank, operation.root);
  const bool needs_output = has_output(collective, rank, operation.root);
  const auto* input = static_cast<const std::byte*>(operation.input);
  const auto* output = static_cast<const std::byte*>(operation.output);
  const bool lacks_input = needs_input && extents.input > 0 && input == nullptr;
  const bool lacks_output = needs_output && extents.output > 0 && output == nullptr;
  if (lacks_input || lacks_output) {
    throw usage_error(name(collective), ": a null buffer for ",
                      lacks_input ? extents.input : extents.output, " elements");
  }
  if (!needs_input || !needs_output || input == nullptr || output == nullptr) return;
  const size_t elem = size_bytes(operation.dtype);
  const bool gathers = collective == Collective::kAllGather || collective == Collective::kGather;
  const bool scatters =
      collective == Collective::kReduceScatter || collective == Collective::kScatter;
  const bool in_place = gathers    ? output + extents.own * elem == input
                        : scatters ? input + extents.own * elem == output
                                   : input == output;
  if (in_place && (collective != Collective::kAllToAll || world == 1)) return;
  if (overlap(input, extents.input * elem, output, extents.output * elem)) {
    throw usage_error(name(collective), ": input and output overlap",
                      in_place ? "; it cannot work in place" : " in part");
  }
}

}  // namespace

const Operation& sized(const Operation& operation, int world, Operation& room) {
  if (operation.counts.empty()) return operation;
  room = operation;
  room.count = *std::max_element(room.counts.begin(), room.counts.end());
  // What is not right about the lists is for check_operation() to say.
  const bool right = room.counts.size() == static_cast<size_t>(world) &&
                     has_blocks(room.collective) &&
                     (room.collective == Collective::kAllToAll ? room.recv_counts == room.counts
                                                               : room.recv_counts.empty());
  if (right && alike(room.counts)) {
    room.counts.clear();
    room.recv_counts.clear();
  }
  return room;
}

void check_operation(const Operation& operation, int rank, int world) {
  const Collective collective = operation.collective;
  if (reduces(collective) && !is_supported(operation.op, operation.dtype)) {
    throw usage_error(name(collective), ": operator ", name(operation.op), " is not defined for ",
                      name(operation.dtype));
  }
  if (is_rooted(collective) && (operation.root < 0 || operation.root >= world)) {
    throw usage_error(name(collective), ": root ", operation.root, " is not a rank of 0..",
                      world - 1);
  }
  check_counts(operation, rank, world);
  check_buffers(operation, rank, world);
}

void check_on_device(const Operation& operation) {
  if (!is_host_only(operation.collective) && operation.counts.empty()) return;
  throw usage_error(name(operation.collective),
                    operation.counts.empty() ? "" : " of blocks of unequal size",
                    " runs on the CPU only; its arrays lie on a CUDA device");
}

size_t told_count(const Operation& operation, int world) {
  if (operation.collective == Collective::kBarrier) return 0;
  if (!operation.counts.empty()) return sum(operation.counts);
  return operation.collective == Collective::kAllToAll ? operation.count * world : operation.count;
}

uint32_t blocks_digest(const Operation& operation) {
  if (operation.counts.empty() || operation.collective == Collective::kAllToAll) return 0;
  uint64_t hash = 0;
  for (const uint64_t count : operation.counts) {  // splitmix64's finaliser over a running sum
    hash += count + 0x9e3779b97f4a7c15u;
    hash = (hash ^ (hash >> 30)) * 0xbf58476d1ce4e5b9u;
    hash = (hash ^ (hash >> 27)) * 0x94d049bb133111ebu;
    hash ^= hash >> 31;
  }
  const auto digest = static_cast<uint32_t>(hash ^ (hash >> 32));
  return digest == 0 ? 1 : digest;
}

}  // namespace dpcomm
