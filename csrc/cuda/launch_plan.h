// From an operation to a launch: which kernel, and its arguments but for pointers. A function of
// what all ranks agree on, so that they cut alike; no CUDA here.
#pragma once

#include <cstddef>
#include <string>

#include "base/dtype.h"
#include "cuda/kernel_args.h"
#include "cuda/layout.h"
#include "transport/channel.h"
#include "wire/wire_format.h"

namespace dpcomm {

/// What the kernels take an element for. kBytes: exact copies (broadcast, all_gather) of any dtype,
/// counted in bytes.
enum class DeviceElement : uint8_t {
  kFloat32,
  kFloat16,
  kBFloat16,
  kInt32,
  kInt64,
  kFloat64,
  kBytes,
};

/// One kernel of the library.
struct KernelId {
  DeviceElement element = DeviceElement::kFloat32;
  WireFormat wire = WireFormat::kNative;
  bool packets = false;

  bool operator==(const KernelId&) const = default;
};

/// "collective_f32_fp16", "packets_f32_fp16".
std::string kernel_name(const KernelId& kernel);

struct LaunchPlan {
  KernelId kernel;
  int blocks_x = 1;  ///< gridDim.x: ctas * lanes of the schedule
  int lanes = 1;     ///< of the schedule
  KernelArgs args;   ///< without ranks, input and output
};

/// Bytes of a slice of `elems` elements on the wire, header included.
size_t wire_slice_bytes(WireFormat wire, Dtype dtype, size_t elems);

/// The CTAs that an operation over `bytes` (of the tensor, or of a block) takes, at most `most`:
/// few, because they are taken from what the caller computes.
int choose_ctas(size_t bytes, int most);

/// Packets of one source that an all_reduce by packets needs, the greeting included.
size_t packets_needed(WireFormat wire, Dtype dtype, size_t count, int ctas);

/// The plan of an operation that was checked (base/reduce_op.h, law 8) with `ctas` CTAs. `tag`
/// tells operations apart and is not 0. One-shot goes by packets where they suffice. Throws
/// UsageError for what the kernels do not support: dtypes and operators, and more slots than the
/// geometry has.
LaunchPlan plan_launch(const OpRecord& record, uint32_t tag, const StagingGeometry& geometry,
                       int ctas);

}  // namespace dpcomm
