#include "cuda/layout.h"

#include <algorithm>

#include "base/error.h"
#include "schedule/registry.h"

namespace dpcomm {
namespace {

constexpr size_t kAlignment = 256;
constexpr size_t kLeastSlotBytes = size_t{4} << 10;
constexpr size_t kMostSlotBytes = size_t{128} << 10;
constexpr size_t kOneShotBytes = size_t{256} << 10;
constexpr int kSlots = 4;

size_t aligned(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

/// Out of line: GCC 12 takes what `others` leaves of a list of peers for a read of no value.
[[gnu::noinline]] int peer_at(const Peers& peers, int i) { return peers[i]; }

/// Calls use(source, target, lane) for each message that a schedule of `world` ranks sends, with
/// every root. Schedules on lane 0 are left out: there everybody may send to everybody.
template <class Use>
void visit_channels(int world, Use use) {
  for (int index = 0; index < kAlgorithmCount; ++index) {
    const AlgorithmInfo& algorithm = kAlgorithms[index];
    if (algorithm.first_lane == 0) continue;
    const bool rooted = algorithm.collective == Collective::kBroadcast ||
                        algorithm.collective == Collective::kReduce;
    for (int root = 0; root < (rooted ? world : 1); ++root) {
      for (int rank = 0; rank < world; ++rank) {
        visit_schedule(index, [&]<class Schedule>(std::type_identity<Schedule>) {
          for (int lane = 0; lane < Schedule::kLanes; ++lane) {
            Schedule schedule(ScheduleParams{rank, world, root, 1}, lane);
            for (Step step; schedule.next(step);) {
              for (int i = 0; i < step.send_peers.count(); ++i) {
                use(rank, peer_at(step.send_peers, i), step.send_lane);
              }
            }
          }
        });
      }
    }
  }
}

}  // namespace

StagingLayout::StagingLayout(const StagingGeometry& geometry) : geometry_(geometry) {
  const int world = geometry.world;
  if (world < 1 || world > kMaxDeviceRanks) {
    throw usage_error("a communicator on devices has 1 to ", kMaxDeviceRanks, " ranks, not ",
                      world);
  }
  if (geometry.ctas < 1 || geometry.ctas > 255 || geometry.slots < 1 ||
      geometry.slot_bytes % 16 != 0 || geometry.slot_bytes == 0) {
    throw usage_error("staging of ", geometry.ctas, " CTAs with ", geometry.slots, " slots of ",
                      geometry.slot_bytes, " bytes makes no sense");
  }
  const int lanes = channel_lanes();
  std::vector<char> used(size_t(world) * lanes * world, 0);
  const auto at = [=](int a, int lane, int b) { return (size_t(a) * lanes + lane) * world + b; };
  for (int a = 0; a < world; ++a) {
    for (int b = 0; b < world; ++b) used[at(a, 0, b)] = a != b;
  }
  visit_channels(world,
                 [&](int source, int target, int lane) { used[at(target, lane, source)] = 1; });
  incoming_.assign(used.size(), -1);
  outgoing_.assign(used.size(), -1);
  for (int rank = 0; rank < world; ++rank) {
    int receives = 0, sends = 0;
    for (int lane = 0; lane < lanes; ++lane) {
      for (int peer = 0; peer < world; ++peer) {
        if (used[at(rank, lane, peer)]) incoming_[at(rank, lane, peer)] = receives++;
        if (used[at(peer, lane, rank)]) outgoing_[at(rank, lane, peer)] = sends++;
      }
    }
    channels_ = std::max(channels_, size_t(receives));
    credits_ = std::max(credits_, size_t(sends));
  }
  // Arrivals, then credits, then slots, then packets; each by CTA, then by channel.
  credits_at_ = channels_ * geometry.ctas * geometry.slots * kFlagLineBytes;
  slots_at_ = aligned(credits_at_ + credits_ * geometry.ctas * kFlagLineBytes);
  packets_at_ =
      aligned(slots_at_ + channels_ * geometry.ctas * geometry.slots * geometry.slot_bytes);
  bytes_ = aligned(packets_at_ + packet_bytes());
}

size_t StagingLayout::packet_bytes() const {
  return geometry_.packet_capacity * 2 * geometry_.world * (kPacketDataBytes + sizeof(uint32_t));
}

int StagingLayout::channel(int source, int target, int lane) const {
  return incoming_[(size_t(target) * channel_lanes() + lane) * geometry_.world + source];
}

bool StagingLayout::has_channel(int source, int target, int lane) const {
  return channel(source, target, lane) >= 0;
}

size_t StagingLayout::arrivals_at(int source, int target, int lane, int cta) const {
  const size_t index = cta * channels_ + channel(source, target, lane);
  return index * geometry_.slots * kFlagLineBytes;
}

size_t StagingLayout::slots_at(int source, int target, int lane, int cta) const {
  const size_t index = cta * channels_ + channel(source, target, lane);
  return slots_at_ + index * geometry_.slots * geometry_.slot_bytes;
}

size_t StagingLayout::credit_at(int source, int target, int lane, int cta) const {
  const int place = outgoing_[(size_t(source) * channel_lanes() + lane) * geometry_.world + target];
  return credits_at_ + (cta * credits_ + place) * kFlagLineBytes;
}

std::vector<ChannelEnds> StagingLayout::ends(int rank, const std::vector<char*>& bases) const {
  const int lanes = channel_lanes();
  const int world = geometry_.world;
  const auto flag = [](char* base, size_t offset) {
    return reinterpret_cast<uint64_t*>(base + offset);
  };
  std::vector<ChannelEnds> table(size_t(geometry_.ctas) * lanes * world, ChannelEnds{});
  for (int cta = 0; cta < geometry_.ctas; ++cta) {
    for (int lane = 0; lane < lanes; ++lane) {
      for (int peer = 0; peer < world; ++peer) {
        ChannelEnds& ends = table[(size_t(cta) * lanes + lane) * world + peer];
        if (has_channel(peer, rank, lane)) {
          ends.recv_slots = bases[rank] + slots_at(peer, rank, lane, cta);
          ends.arrival = flag(bases[rank], arrivals_at(peer, rank, lane, cta));
          ends.peer_credit = flag(bases[peer], credit_at(peer, rank, lane, cta));
        }
        if (has_channel(rank, peer, lane)) {
          ends.send_slots = bases[peer] + slots_at(rank, peer, lane, cta);
          ends.peer_arrival = flag(bases[peer], arrivals_at(rank, peer, lane, cta));
          ends.credit = flag(bases[rank], credit_at(rank, peer, lane, cta));
        }
      }
    }
  }
  return table;
}

StagingGeometry choose_geometry(int world, int ctas, size_t budget) {
  // Packets first: an eighth of the budget at most. Two parities, a buffer for each source.
  const size_t packet_budget = budget / 8 / (2 * 16 * size_t(std::max(world, 1)));
  const size_t wanted = (kOneShotBytes + kPacketDataBytes - 1) / kPacketDataBytes;
  StagingGeometry geometry{world, ctas, kSlots, kMostSlotBytes, std::min(wanted, packet_budget)};
  size_t needed = 0;
  for (; geometry.slot_bytes >= kLeastSlotBytes; geometry.slot_bytes /= 2) {
    needed = StagingLayout(geometry).bytes();
    if (needed <= budget) return geometry;
  }
  throw usage_error("staging for ", world, " ranks and ", ctas, " CTAs takes at least ", needed,
                    " bytes, and ", budget, " are allowed; allow more, or fewer CTAs");
}

}  // namespace dpcomm
