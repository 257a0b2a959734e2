// The arithmetic of reductions on two values of one accumulator type.
#pragma once

#include "base/reduce_op.h"
#include "wire/bits.h"

namespace dpcomm {
namespace {

/// Marks an element of a bool tensor: any value but 0 is true, results are 0 or 1.
struct Bool {
  uint8_t value;
};

template <class T>
inline constexpr bool kIsFloat64 = false;
template <>
inline constexpr bool kIsFloat64<double> = true;
template <class T>
inline constexpr bool kIsBool = false;
template <>
inline constexpr bool kIsBool<Bool> = true;

/// Integers are combined as unsigned numbers of at least 32 bits, so that overflow wraps.
template <class T>
struct Wide {
  using type = uint32_t;
};
template <>
struct Wide<int64_t> {
  using type = uint64_t;
};

/// MIN and MAX: NaN propagates, and -0 counts as less than +0, so the bits do not depend on the
/// order of the operands. Equal values other than zeros have equal bits: or and and keep them.
template <ReduceOp op, class T, class Bits>
DPCOMM_HD inline T extreme(T a, T b, Bits nan) {
  const Bits a_bits = bits_as<Bits>(a);
  const Bits b_bits = bits_as<Bits>(b);
  const bool first = op == ReduceOp::kMin ? a < b : a > b;
  const bool second = op == ReduceOp::kMin ? b < a : b > a;
  const Bits equal = op == ReduceOp::kMin ? (a_bits | b_bits) : (a_bits & b_bits);
  const Bits ordered = first ? a_bits : second ? b_bits : equal;
  return bits_as<T>(a == a && b == b ? ordered : nan);
}

template <ReduceOp op, class T, class Bits>
DPCOMM_HD inline T combined_floating(T a, T b, Bits nan) {
  if constexpr (op == ReduceOp::kSum) {
    return a + b;
  } else if constexpr (op == ReduceOp::kProduct) {
    return a * b;
  } else {
    return extreme<op>(a, b, nan);
  }
}

template <ReduceOp op>
DPCOMM_HD inline float combined(float a, float b) {
  return combined_floating<op>(a, b, kNan32);
}

template <ReduceOp op>
DPCOMM_HD inline double combined(double a, double b) {
  return combined_floating<op>(a, b, kNan64);
}

template <ReduceOp op>
DPCOMM_HD inline Bool combined(Bool a, Bool b) {
  const bool x = a.value != 0;
  const bool y = b.value != 0;
  switch (op) {
    case ReduceOp::kSum:
    case ReduceOp::kMax:
    case ReduceOp::kBor:
      return {static_cast<uint8_t>(x | y)};
    case ReduceOp::kBxor:
      return {static_cast<uint8_t>(x ^ y)};
    default:
      return {static_cast<uint8_t>(x & y)};
  }
}

template <ReduceOp op, class T>
DPCOMM_HD inline T combined(T a, T b) {
  using W = typename Wide<T>::type;
  switch (op) {
    case ReduceOp::kSum:
      return static_cast<T>(static_cast<W>(a) + static_cast<W>(b));
    case ReduceOp::kProduct:
      return static_cast<T>(static_cast<W>(a) * static_cast<W>(b));
    case ReduceOp::kMin:
      return b < a ? b : a;
    case ReduceOp::kMax:
      return b > a ? b : a;
    case ReduceOp::kBand:
      return static_cast<T>(a & b);
    case ReduceOp::kBor:
      return static_cast<T>(a | b);
    default:
      return static_cast<T>(a ^ b);
  }
}

/// What a tensor of T stores for an accumulator.
DPCOMM_HD inline double as_stored(double x) { return canonical_nan(x); }
DPCOMM_HD inline Bool as_stored(Bool x) { return {static_cast<uint8_t>(x.value != 0)}; }
template <class T>
DPCOMM_HD inline T as_stored(T x) {
  return x;
}

/// What an accumulator holds for an element of a tensor of T.
DPCOMM_HD inline Bool as_loaded(Bool x) { return as_stored(x); }
template <class T>
DPCOMM_HD inline T as_loaded(T x) {
  return x;
}

/// The quotient by a positive divisor, toward zero for integers.
DPCOMM_HD inline float quotient(float x, int64_t divisor) {
  return x / static_cast<float>(divisor);
}
DPCOMM_HD inline double quotient(double x, int64_t divisor) {
  return x / static_cast<double>(divisor);
}
template <class T>
DPCOMM_HD inline T quotient(T x, int64_t divisor) {
  return static_cast<T>(static_cast<int64_t>(x) / divisor);
}

}  // namespace
}  // namespace dpcomm
