#include "cuda/launch_plan.h"

#include <algorithm>

#include "base/error.h"
#include "schedule/cut.h"
#include "wire/block.h"

namespace dpcomm {
namespace {

constexpr size_t kBytesPerCta = size_t{64} << 10;

DeviceElement element_of(const OpRecord& record) {
  const Dtype dtype = static_cast<Dtype>(record.dtype);
  if (!reduces(static_cast<Collective>(record.collective))) return DeviceElement::kBytes;
  switch (dtype) {
    case Dtype::kFloat32:
      return DeviceElement::kFloat32;
    case Dtype::kFloat16:
      return DeviceElement::kFloat16;
    case Dtype::kBFloat16:
      return DeviceElement::kBFloat16;
    case Dtype::kInt32:
      return DeviceElement::kInt32;
    case Dtype::kInt64:
      return DeviceElement::kInt64;
    case Dtype::kFloat64:
      return DeviceElement::kFloat64;
    default:
      throw usage_error("reductions of ", name(dtype), " are not supported on CUDA devices");
  }
}

void check_op(const OpRecord& record) {
  const ReduceOp op = static_cast<ReduceOp>(record.op);
  if (op == ReduceOp::kBand || op == ReduceOp::kBor || op == ReduceOp::kBxor) {
    throw usage_error("reduction by ", name(op), " is not supported on CUDA devices");
  }
}

}  // namespace

std::string kernel_name(const KernelId& kernel) {
  constexpr const char* kElements[] = {"f32", "f16", "bf16", "i32", "i64", "f64", "bytes"};
  return std::string(kernel.packets ? "packets_" : "collective_") +
         kElements[static_cast<int>(kernel.element)] + "_" + name(kernel.wire);
}

size_t wire_slice_bytes(WireFormat wire, Dtype dtype, size_t elems) {
  switch (wire) {
    case WireFormat::kFp16:
      return BlockLayout<block_elems(WireFormat::kFp16), 2>::slice_bytes(elems);
    case WireFormat::kInt8:
      return BlockLayout<block_elems(WireFormat::kInt8), 1>::slice_bytes(elems);
    case WireFormat::kBf16:
      return elems * 2;
    case WireFormat::kNative:
      break;
  }
  return elems * size_bytes(dtype);
}

int choose_ctas(size_t bytes, int most) {
  const size_t wanted = (bytes + kBytesPerCta - 1) / kBytesPerCta;
  return static_cast<int>(std::clamp<size_t>(wanted, 1, most));
}

size_t packets_needed(WireFormat wire, Dtype dtype, size_t count, int ctas) {
  const size_t grain = std::max<size_t>(kGrainBytes / size_bytes(dtype), block_elems(wire));
  const size_t tile_elems = packet_tile_elems(wire, size_bytes(dtype));
  const size_t tiles = (cta_part(count, grain, ctas, 0).count + tile_elems - 1) / tile_elems;
  const size_t tile_bytes = wire_slice_bytes(wire, dtype, tile_elems);
  return 1 + ctas * tiles * ((tile_bytes + kPacketDataBytes - 1) / kPacketDataBytes);
}

LaunchPlan plan_launch(const OpRecord& record, uint32_t tag, const StagingGeometry& geometry,
                       int ctas) {
  const AlgorithmInfo& algorithm = kAlgorithms[record.algorithm];
  const Collective collective = static_cast<Collective>(record.collective);
  const WireFormat wire = static_cast<WireFormat>(record.wire);
  LaunchPlan plan;
  plan.kernel.element = element_of(record);
  plan.kernel.wire = wire;
  if (reduces(collective)) check_op(record);
  // Exact copies are of bytes, whatever they are to the caller.
  const bool copies = plan.kernel.element == DeviceElement::kBytes;
  const Dtype dtype = copies ? Dtype::kUint8 : static_cast<Dtype>(record.dtype);
  const size_t count = record.count * (copies ? size_bytes(static_cast<Dtype>(record.dtype)) : 1);

  // The cut of the largest part, for all CTAs.
  CutParams params{record.algorithm,  geometry.world,    record.root,    0,
                   size_bytes(dtype), block_elems(wire), geometry.slots, geometry.slot_bytes};
  const auto slice_bytes = [=](size_t elems) { return wire_slice_bytes(wire, dtype, elems); };
  params.count =
      cta_part(count, std::max(kGrainBytes / params.elem_bytes, params.block_elems), ctas, 0).count;
  const Cut cut = choose_cut(params, slice_bytes);
  const int least = algorithm.min_slots(ScheduleParams{0, geometry.world, record.root, cut.slices});
  if (geometry.slots < least) {
    throw usage_error(name(collective), " by ", algorithm.name, " needs ", least,
                      " slots, and staging has ", geometry.slots);
  }
  if (slice_bytes(cut.slot_elems) > geometry.slot_bytes) {
    throw usage_error("slots of ", geometry.slot_bytes, " bytes are too small for ", cut.slot_elems,
                      " elements");
  }

  // Without elements no rank would hear from the others, on which the packets' buffers rely.
  plan.kernel.packets = collective == Collective::kAllReduce && count > 0 &&
                        record.algorithm == find_algorithm(Collective::kAllReduce, "one_shot") &&
                        packets_needed(wire, dtype, count, ctas) <= geometry.packet_capacity;
  plan.lanes = plan.kernel.packets ? 1 : algorithm.lanes;
  plan.blocks_x = ctas * plan.lanes;
  plan.args.count = count;
  plan.args.sequence = record.sequence;
  plan.args.slot_elems = cut.slot_elems;
  plan.args.grain = cut.grain;
  plan.args.factor = record.factor;
  plan.args.tag = tag;
  plan.args.root = record.root;
  plan.args.slices = cut.slices;
  plan.args.collective = record.collective;
  plan.args.algorithm = record.algorithm;
  plan.args.op = record.op;
  plan.args.ctas = static_cast<uint8_t>(ctas);
  return plan;
}

}  // namespace dpcomm
