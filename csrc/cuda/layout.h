// Where everything lies in a rank's staging. A function of its arguments alone, the same on all
// ranks; no CUDA here.
#pragma once

#include <cstddef>
#include <vector>

#include "cuda/kernel_args.h"

namespace dpcomm {

/// What all ranks agree on.
struct StagingGeometry {
  int world = 1;
  int ctas = 1;                ///< the most that an operation may use
  int slots = 4;               ///< of each channel
  size_t slot_bytes = 0;       ///< a multiple of 16
  size_t packet_capacity = 0;  ///< packets from one source with one parity; 0: no packets
};

/// Offsets in bytes from the start of a rank's staging. Zero bytes are its first state.
class StagingLayout {
 public:
  /// Throws UsageError for a world, a number of slots or a size that makes no sense.
  explicit StagingLayout(const StagingGeometry& geometry);

  const StagingGeometry& geometry() const { return geometry_; }
  /// Of the whole staging: the same for every rank, a multiple of 256.
  size_t bytes() const { return bytes_; }

  /// True if some schedule sends from `source` to `target` in channel lane `lane`.
  bool has_channel(int source, int target, int lane) const;
  /// In the target's staging.
  size_t slots_at(int source, int target, int lane, int cta) const;
  size_t arrivals_at(int source, int target, int lane, int cta) const;
  /// In the source's staging.
  size_t credit_at(int source, int target, int lane, int cta) const;
  /// The packet buffer of any rank.
  size_t packets_at() const { return packets_at_; }
  size_t packet_bytes() const;

  /// The table of `rank`, [cta][channel lane][peer]; bases[r] is rank r's staging as seen by it.
  std::vector<ChannelEnds> ends(int rank, const std::vector<char*>& bases) const;

 private:
  int channel(int source, int target, int lane) const;
  StagingGeometry geometry_;
  std::vector<int> incoming_;  // [target][lane][source] -> place among the target's channels, or -1
  std::vector<int> outgoing_;  // [source][lane][target] -> place among the source's credits, or -1
  size_t channels_ = 0;        // of one CTA, the most that any rank receives on
  size_t credits_ = 0;
  size_t credits_at_ = 0, slots_at_ = 0, packets_at_ = 0, bytes_ = 0;
};

/// The largest geometry for `world` ranks whose staging takes at most `budget` bytes: as many ctas
/// as given, four slots, slots of 4 to 128 KiB, packets for one-shot messages of up to 256 KiB
/// (fewer where the budget is small). Throws UsageError with the bytes needed if even the least
/// does not fit.
StagingGeometry choose_geometry(int world, int ctas, size_t budget);

}  // namespace dpcomm
