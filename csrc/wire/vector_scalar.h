// The vector trait of one element: the reference, and the tail of every other trait.
//
// A trait is a class with kWidth, a register type Reg of kWidth floats, and the functions below.
// Memory may have any alignment.
#pragma once

#include "wire/bits.h"

namespace dpcomm {
namespace {

struct Scalar {
  static constexpr size_t kWidth = 1;
  using Reg = float;

  static Reg load(const void* p) { return load_as<float>(p); }
  static void store(void* p, Reg x) { store_as(p, x); }
  static Reg load_fp16(const void* p) { return float_of_fp16(load_as<uint16_t>(p)); }
  static Reg load_bf16(const void* p) { return float_of_bf16(load_as<uint16_t>(p)); }
  /// Round to nearest even, NaN canonical.
  static void store_fp16(void* p, Reg x) { store_as(p, fp16_of(bits_as<uint32_t>(x))); }
  static void store_bf16(void* p, Reg x) { store_as(p, bf16_of(bits_as<uint32_t>(x))); }

  static Reg all(float x) { return x; }
  static Reg add(Reg a, Reg b) { return a + b; }
  static Reg mul(Reg a, Reg b) { return a * b; }
  static Reg div(Reg a, Reg b) { return a / b; }
  static Reg canonical(Reg x) { return canonical_nan(x); }
};

/// Calls body(trait, i) for every i in [0, n) in steps of the trait's width: V, then Scalar.
template <class V, class Body>
inline void for_vectors(size_t n, Body body) {
  size_t i = 0;
  for (; i + V::kWidth <= n; i += V::kWidth) body(V{}, i);
  if constexpr (V::kWidth > 1) {
    for (; i < n; ++i) body(Scalar{}, i);
  }
}

}  // namespace
}  // namespace dpcomm
