// Reduction operators, as torch.distributed names them.
#pragma once

#include <cstdint>

#include "base/dtype.h"
#include "base/macros.h"

namespace dpcomm {

enum class ReduceOp : uint8_t {
  kSum,
  kAvg,        ///< sum, then divided by world_size in the accumulation type
  kPremulSum,  ///< each contribution times a factor (rounded to the tensor's dtype), then summed
  kProduct,
  kMin,  ///< NaN propagates
  kMax,  ///< NaN propagates
  kBand,
  kBor,
  kBxor,
};
inline constexpr int kReduceOps = 9;

constexpr const char* name(ReduceOp op) {
  constexpr const char* kNames[kReduceOps] = {"sum", "avg",  "premul_sum", "product", "min",
                                              "max", "band", "bor",        "bxor"};
  return kNames[static_cast<int>(op)];
}

/// The operator that combines two contributions: SUM for AVG and PREMUL_SUM, else itself.
DPCOMM_HD constexpr ReduceOp combiner(ReduceOp op) {
  return op == ReduceOp::kAvg || op == ReduceOp::kPremulSum ? ReduceOp::kSum : op;
}

/// Which pairs make sense: bitwise operators want integers or bool, PREMUL_SUM wants floating
/// types, AVG everything but bool. On bool SUM and MAX are "or", PRODUCT and MIN are "and".
constexpr bool is_supported(ReduceOp op, Dtype dtype) {
  switch (op) {
    case ReduceOp::kPremulSum:
      return is_floating(dtype);
    case ReduceOp::kAvg:
      return dtype != Dtype::kBool;
    case ReduceOp::kBand:
    case ReduceOp::kBor:
    case ReduceOp::kBxor:
      return !is_floating(dtype);
    default:
      return true;
  }
}

}  // namespace dpcomm
