#include "staging_names.h"

#include "base/error.h"
#include "schedule/registry.h"

namespace dpcomm::emulated {
namespace {

constexpr size_t kPacketBytes = kPacketDataBytes + sizeof(uint32_t);

std::string packet_name(const StagingGeometry& geometry, size_t offset, uint64_t epoch) {
  const size_t packet = offset / kPacketBytes;
  const size_t buffer = packet / geometry.packet_capacity;
  return str("packet ", packet % geometry.packet_capacity, " from rank ", buffer % geometry.world,
             ", parity ", buffer / geometry.world, ": epoch ", epoch);
}

}  // namespace

std::string name_in_staging(const StagingLayout& layout, int rank, size_t offset, uint64_t value) {
  const StagingGeometry& geometry = layout.geometry();
  if (offset >= layout.packets_at() && offset < layout.packets_at() + layout.packet_bytes()) {
    return packet_name(geometry, offset - layout.packets_at(), value);
  }
  for (int lane = 0; lane < channel_lanes(); ++lane) {
    for (int peer = 0; peer < geometry.world; ++peer) {
      for (int cta = 0; cta < geometry.ctas; ++cta) {
        if (layout.has_channel(peer, rank, lane)) {
          const size_t first = layout.arrivals_at(peer, rank, lane, cta);
          if (offset >= first && offset < first + geometry.slots * kFlagLineBytes) {
            return str("arrival of ", peer, "->", rank, ", lane ", lane, ", cta ", cta, ", slot ",
                       (offset - first) / kFlagLineBytes, ": message ",
                       static_cast<uint32_t>(value));
          }
        }
        if (layout.has_channel(rank, peer, lane) &&
            layout.credit_at(rank, peer, lane, cta) == offset) {
          return str("credit of ", rank, "->", peer, ", lane ", lane, ", cta ", cta, ": ", value,
                     " released");
        }
      }
    }
  }
  return "";
}

}  // namespace dpcomm::emulated
