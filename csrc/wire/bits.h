// IEEE 754 on the bits: canonical NaN, rounding to fp16 and bf16, powers of two. These are the
// reference that every SIMD trait must equal; they work on integers, so that no mode of the
// floating-point unit reaches them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "base/macros.h"

namespace dpcomm {
namespace {

inline constexpr uint32_t kMagnitude32 = 0x7fffffff;
inline constexpr uint32_t kInfinity32 = 0x7f800000;
inline constexpr uint32_t kNan32 = 0x7fc00000;
inline constexpr uint64_t kNan64 = 0x7ff8000000000000;
inline constexpr uint16_t kNan16 = 0x7e00;
inline constexpr uint16_t kNanBf16 = 0x7fc0;

/// The value of type T at p, which may have any alignment.
template <class T>
DPCOMM_HD inline T load_as(const void* p) {
  T value;
  std::memcpy(&value, p, sizeof(T));
  return value;
}

template <class T>
DPCOMM_HD inline void store_as(void* p, T value) {
  std::memcpy(p, &value, sizeof(T));
}

/// The bits of `from` as a value of type To.
template <class To, class From>
DPCOMM_HD inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

DPCOMM_HD inline float canonical_nan(float x) { return x == x ? x : bits_as<float>(kNan32); }
DPCOMM_HD inline double canonical_nan(double x) { return x == x ? x : bits_as<double>(kNan64); }

/// Bits of a float rounded to fp16, to nearest even; overflow gives Inf, NaN the canonical one.
DPCOMM_HD inline uint16_t fp16_of(uint32_t bits) {
  const uint32_t sign = (bits >> 16) & 0x8000;
  const uint32_t magnitude = bits & kMagnitude32;
  if (magnitude > kInfinity32) return kNan16;
  if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // 65520 and above
  if (magnitude >= 0x38800000) {  // 2^-14 and above: normal in fp16
    const uint32_t rebased = magnitude - 0x38000000;
    const uint32_t rounded = rebased + 0xfff + ((rebased >> 13) & 1);
    return static_cast<uint16_t>(sign | (rounded >> 13));
  }
  if (magnitude <= 0x33000000) return static_cast<uint16_t>(sign);  // up to 2^-25, a tie to zero
  const uint32_t significand = (magnitude & 0x7fffff) | 0x800000;
  const uint32_t shift = 126 - (magnitude >> 23);  // 14..24: what lies below fp16's unit, 2^-24
  const uint32_t half = (1u << (shift - 1)) - 1 + ((significand >> shift) & 1);
  return static_cast<uint16_t>(sign | ((significand + half) >> shift));
}

/// The float of fp16 bits; exact. A signalling NaN becomes quiet, as the hardware does it.
DPCOMM_HD inline float float_of_fp16(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t magnitude = half & 0x7fff;
  if (magnitude >= 0x7c00) {
    const uint32_t quiet = magnitude > 0x7c00 ? 0x400000 : 0;
    return bits_as<float>(sign | kInfinity32 | ((magnitude & 0x3ff) << 13) | quiet);
  }
  if (magnitude >= 0x400) return bits_as<float>(sign | ((magnitude << 13) + 0x38000000));
  const float value = static_cast<float>(magnitude) * 0x1p-24f;
  return bits_as<float>(sign | bits_as<uint32_t>(value));
}

/// Bits of a float rounded to bf16, to nearest even; overflow gives Inf, NaN the canonical one.
DPCOMM_HD inline uint16_t bf16_of(uint32_t bits) {
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return (bits & kMagnitude32) > kInfinity32 ? kNanBf16 : static_cast<uint16_t>(rounded);
}

DPCOMM_HD inline float float_of_bf16(uint16_t brain) {
  return bits_as<float>(static_cast<uint32_t>(brain) << 16);
}

/// 2^(biased - 127) for 1 <= biased <= 254.
DPCOMM_HD inline float power_of_two(uint32_t biased) { return bits_as<float>(biased << 23); }

/// The bits of a finite number's magnitude; 0 for Inf and NaN.
DPCOMM_HD inline uint32_t finite_magnitude(float x) {
  const uint32_t magnitude = bits_as<uint32_t>(x) & kMagnitude32;
  return magnitude < kInfinity32 ? magnitude : 0;
}

/// The largest magnitude among the finite ones of n floats, as bits; 0 where there is none.
DPCOMM_HD inline uint32_t largest_finite_bits(const float* values, size_t n) {
  int32_t largest = 0;
  for (size_t i = 0; i < n; ++i) {
    const int32_t magnitude = static_cast<int32_t>(bits_as<uint32_t>(values[i]) & kMagnitude32);
    const int32_t finite = magnitude < static_cast<int32_t>(kInfinity32) ? magnitude : 0;
    largest = finite > largest ? finite : largest;
  }
  return static_cast<uint32_t>(largest);
}

}  // namespace
}  // namespace dpcomm
