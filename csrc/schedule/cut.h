// How the tensor of an operation is cut for channels of a given geometry: the rule that all readers
// share (law 5).
#pragma once

#include <cstddef>

#include "schedule/collective.h"
#include "schedule/registry.h"

namespace dpcomm {

inline constexpr size_t kGrainBytes = 64;  ///< edges of slices fall on such bytes of the tensor
inline constexpr int kMaxSlices = 2;       ///< slices per chunk

/// What a cut is made from. All ranks agree on everything here.
struct CutParams {
  int algorithm = 0;  ///< index into kAlgorithms
  int world = 1;
  int root = 0;
  size_t count = 0;        ///< elements of the tensor, or of the largest block (has_blocks)
  size_t elem_bytes = 4;   ///< of the tensor
  size_t block_elems = 1;  ///< of the wire format
  int slots = 1;           ///< of a channel
  size_t slot_bytes = 0;
};

/// Slices per chunk, and elements of the largest slice: what a Partition is made from.
struct Cut {
  int slices = 1;
  size_t slot_elems = 1;
  size_t grain = 1;  ///< elements
};

/// Elements whose slice fits a slot, a multiple of `grain`. slice_bytes(elems) is the wire
/// format's.
template <class SliceBytes>
size_t elems_per_slot(SliceBytes slice_bytes, size_t slot_bytes, size_t grain) {
  size_t elems = slot_bytes / grain * grain;  // no format takes less than a byte an element
  while (elems > grain && slice_bytes(elems) > slot_bytes) {
    const size_t fitting = elems * slot_bytes / slice_bytes(elems) / grain * grain;
    elems = fitting < elems - grain ? fitting : elems - grain;
    if (elems < grain) elems = grain;
  }
  return elems;
}

/// One slice a chunk if everything fits one round so, else as many as the slots allow, up to
/// kMaxSlices.
template <class SliceBytes>
Cut choose_cut(const CutParams& params, SliceBytes slice_bytes) {
  const AlgorithmInfo& algorithm = kAlgorithms[params.algorithm];
  Cut cut;
  cut.grain = kGrainBytes / params.elem_bytes;
  if (cut.grain < 1) cut.grain = 1;
  if (cut.grain < params.block_elems) cut.grain = params.block_elems;
  cut.slot_elems = elems_per_slot(slice_bytes, params.slot_bytes, cut.grain);
  const bool blocked = has_blocks(algorithm.collective);
  // A pair of ranks cuts its block alone: there is no count that all know.
  if (algorithm.collective == Collective::kAllToAll) return cut;
  ScheduleParams trial{0, params.world, params.root, 1};
  const int chunks = algorithm.chunks(trial);
  for (; cut.slices < kMaxSlices; ++cut.slices) {
    const Partition partition(params.count, chunks, cut.slices, cut.slot_elems, cut.grain, blocked);
    if (partition.rounds() <= 1) break;
    trial.slices = cut.slices + 1;
    if (algorithm.min_slots(trial) > params.slots) break;
  }
  return cut;
}

}  // namespace dpcomm
