// The names of the wire formats, and which messages may take a lossy one (DESIGN law 8).
#pragma once

#include <cstdint>

#include "base/dtype.h"
#include "base/reduce_op.h"

namespace dpcomm {

enum class WireFormat : uint8_t {
#define DPCOMM_WIRE_FORMAT(id, name, block) id,
#include "wire/formats.def"
#undef DPCOMM_WIRE_FORMAT
};

constexpr const char* name(WireFormat wire) {
  constexpr const char* kNames[] = {
#define DPCOMM_WIRE_FORMAT(id, name, block) name,
#include "wire/formats.def"
#undef DPCOMM_WIRE_FORMAT
  };
  return kNames[static_cast<int>(wire)];
}

inline constexpr int kWireFormats = 0
#define DPCOMM_WIRE_FORMAT(id, name, block) +1
#include "wire/formats.def"
#undef DPCOMM_WIRE_FORMAT
    ;

/// Elements that share a scale; the edges of chunks and slices fall on multiples of it.
constexpr size_t block_elems(WireFormat wire) {
  constexpr size_t kBlocks[] = {
#define DPCOMM_WIRE_FORMAT(id, name, block) block,
#include "wire/formats.def"
#undef DPCOMM_WIRE_FORMAT
  };
  return kBlocks[static_cast<int>(wire)];
}

/// True if a reduction by `op` over `dtype` may go in a lossy wire format.
constexpr bool may_be_lossy(ReduceOp op, Dtype dtype) {
  return accumulates_in_fp32(dtype) && combiner(op) == ReduceOp::kSum;
}

}  // namespace dpcomm
