// Element types that a tensor can have.
#pragma once

#include <cstddef>
#include <cstdint>

namespace dpcomm {

enum class Dtype : uint8_t {
  kFloat32,
  kFloat64,
  kFloat16,
  kBFloat16,
  kInt8,
  kUint8,
  kInt16,
  kInt32,
  kInt64,
  kBool,
};
inline constexpr int kDtypes = 10;

/// Bytes of one element.
constexpr size_t size_bytes(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat64:
    case Dtype::kInt64:
      return 8;
    case Dtype::kFloat32:
    case Dtype::kInt32:
      return 4;
    case Dtype::kFloat16:
    case Dtype::kBFloat16:
    case Dtype::kInt16:
      return 2;
    case Dtype::kInt8:
    case Dtype::kUint8:
    case Dtype::kBool:
      return 1;
  }
  return 0;
}

constexpr bool is_floating(Dtype dtype) {
  return dtype == Dtype::kFloat32 || dtype == Dtype::kFloat64 || dtype == Dtype::kFloat16 ||
         dtype == Dtype::kBFloat16;
}

/// True for the types that are added in fp32 and that a lossy wire may carry.
constexpr bool accumulates_in_fp32(Dtype dtype) {
  return dtype == Dtype::kFloat32 || dtype == Dtype::kFloat16 || dtype == Dtype::kBFloat16;
}

/// Bytes of one element of the accumulator: fp32 for floating types of 32 bits and fewer, the type
/// itself otherwise (integers wrap as in NCCL and gloo).
constexpr size_t accumulator_bytes(Dtype dtype) {
  return accumulates_in_fp32(dtype) ? 4 : size_bytes(dtype);
}

constexpr const char* name(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat32:
      return "float32";
    case Dtype::kFloat64:
      return "float64";
    case Dtype::kFloat16:
      return "float16";
    case Dtype::kBFloat16:
      return "bfloat16";
    case Dtype::kInt8:
      return "int8";
    case Dtype::kUint8:
      return "uint8";
    case Dtype::kInt16:
      return "int16";
    case Dtype::kInt32:
      return "int32";
    case Dtype::kInt64:
      return "int64";
    case Dtype::kBool:
      return "bool";
  }
  return "?";
}

}  // namespace dpcomm
