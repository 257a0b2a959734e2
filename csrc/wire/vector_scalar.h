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

  /// -128 is NaN; see int8_of.
  static Reg load_int8(const void* p) { return float_of_int8(load_as<int8_t>(p)); }
  static void store_int8(void* p, Reg x) { store_as(p, int8_of(x)); }

  static Reg all(float x) { return x; }
  static Reg add(Reg a, Reg b) { return a + b; }
  static Reg mul(Reg a, Reg b) { return a * b; }
  static Reg div(Reg a, Reg b) { return a / b; }
  static Reg canonical(Reg x) { return canonical_nan(x); }

  /// finite_key by lane, and the largest of all lanes.
  using Keys = uint32_t;
  static Keys no_keys() { return 0; }
  static Keys keys_of(Reg x) { return finite_key(bits_as<uint32_t>(x)); }
  static Keys larger(Keys a, Keys b) { return a > b ? a : b; }
  static uint32_t largest_key(Keys keys) { return keys; }
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

/// The largest magnitude among the finite ones of n floats, as bits; 0 where there is none.
template <class V>
inline uint32_t largest_finite_bits(const float* values, size_t n) {
  constexpr size_t kChains = 4;  // independent, to hide the latency of max
  typename V::Keys chains[kChains];
  for (auto& keys : chains) keys = V::no_keys();
  size_t i = 0;
  for (; i + kChains * V::kWidth <= n; i += kChains * V::kWidth) {
    for (size_t k = 0; k < kChains; ++k) {
      chains[k] = V::larger(chains[k], V::keys_of(V::load(values + i + k * V::kWidth)));
    }
  }
  const auto even = V::larger(chains[0], chains[2]);
  const auto odd = V::larger(chains[1], chains[3]);
  uint32_t largest = V::largest_key(V::larger(even, odd));
  for (; i < n; ++i) largest = Scalar::larger(largest, Scalar::keys_of(values[i]));
  return magnitude_of_key(largest);
}

}  // namespace
}  // namespace dpcomm
