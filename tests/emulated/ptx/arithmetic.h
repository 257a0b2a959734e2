// What PTX instructions compute, on plain values: the PTX ISA's text in C++. Nothing here is shared
// with the library, so that a mistake there cannot hide here. Rounding is to nearest even, no flush
// of subnormals (the only mode that dpcomm uses; the translator refuses the others).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#define PTX_INLINE inline __attribute__((always_inline))

namespace ptx {

using u128 = unsigned __int128;

// --- registers: unsigned integers of their width ------------------------------------------------
template <class T>
using Bits =
    std::conditional_t<sizeof(T) == 1, uint8_t,
                       std::conditional_t<sizeof(T) == 2, uint16_t,
                                          std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>>>;

template <class To, class From>
PTX_INLINE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  return __builtin_bit_cast(To, from);
}

/// A register read as T: its bits, or its low bits.
template <class T, class Register>
PTX_INLINE T as(Register value) {
  static_assert(sizeof(T) <= sizeof(Register));
  if constexpr (sizeof(T) == sizeof(Register)) {
    return bits_as<T>(value);
  } else {
    return bits_as<T>(static_cast<Bits<T>>(value));
  }
}

/// What a register holds once `value` is written to it: sign-extended where T is signed.
template <class Register, class T>
PTX_INLINE Register put(T value) {
  static_assert(sizeof(T) <= sizeof(Register));
  if constexpr (sizeof(T) == sizeof(Register)) {
    return bits_as<Register>(value);
  } else if constexpr (std::is_integral_v<T> && std::is_signed_v<T>) {
    return static_cast<Register>(static_cast<int64_t>(value));
  } else {
    return static_cast<Register>(bits_as<Bits<T>>(value));
  }
}

// --- integers: wrap around ----------------------------------------------------------------------
template <class T>
using Unsigned = std::make_unsigned_t<T>;
template <class T>
using Wide =
    std::conditional_t<std::is_signed_v<T>,
                       std::conditional_t<sizeof(T) == 2, int32_t,
                                          std::conditional_t<sizeof(T) == 4, int64_t, __int128>>,
                       std::conditional_t<sizeof(T) == 2, uint32_t,
                                          std::conditional_t<sizeof(T) == 4, uint64_t, u128>>>;
template <class T>
inline constexpr unsigned kBits = 8 * sizeof(T);

template <class T>
PTX_INLINE T add(T a, T b) {
  return static_cast<T>(static_cast<uint64_t>(a) + static_cast<uint64_t>(b));
}
template <class T>
PTX_INLINE T sub(T a, T b) {
  return static_cast<T>(static_cast<uint64_t>(a) - static_cast<uint64_t>(b));
}
template <class T>
PTX_INLINE T mul_lo(T a, T b) {
  return static_cast<T>(static_cast<uint64_t>(a) * static_cast<uint64_t>(b));
}
template <class T>
PTX_INLINE T mul_hi(T a, T b) {
  return static_cast<T>((static_cast<Wide<T>>(a) * static_cast<Wide<T>>(b)) >> kBits<T>);
}
template <class T>
PTX_INLINE Wide<T> mul_wide(T a, T b) {
  return static_cast<Wide<T>>(a) * static_cast<Wide<T>>(b);
}
/// Division by zero gives an unspecified value; here all ones.
template <class T>
PTX_INLINE T div(T a, T b) {
  if (b == 0) return static_cast<T>(-1);
  if constexpr (std::is_signed_v<T>) {
    if (b == -1) return sub<T>(0, a);
  }
  return static_cast<T>(a / b);
}
template <class T>
PTX_INLINE T rem(T a, T b) {
  if (b == 0) return a;
  if constexpr (std::is_signed_v<T>) {
    if (b == -1) return 0;
  }
  return static_cast<T>(a % b);
}
template <class T>
PTX_INLINE T neg(T a) {
  return sub<T>(0, a);
}
template <class T>
PTX_INLINE T abs(T a) {
  return a < 0 ? neg(a) : a;
}
template <class T>
PTX_INLINE T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
PTX_INLINE T max(T a, T b) {
  return a < b ? b : a;
}
template <class T>
PTX_INLINE T sad(T a, T b, T c) {
  return add<T>(c, a < b ? sub(b, a) : sub(a, b));
}
/// `value` brought into the range of T.
template <class T, class From>
PTX_INLINE T saturate(From value) {
  using Limits = std::numeric_limits<T>;
  const __int128 wide = value;
  if (wide < static_cast<__int128>(Limits::min())) return Limits::min();
  if (wide > static_cast<__int128>(Limits::max())) return Limits::max();
  return static_cast<T>(value);
}
PTX_INLINE int32_t add_sat(int32_t a, int32_t b) { return saturate<int32_t>(int64_t{a} + b); }
PTX_INLINE int32_t sub_sat(int32_t a, int32_t b) { return saturate<int32_t>(int64_t{a} - b); }

// --- bits ---------------------------------------------------------------------------------------
template <class T>
PTX_INLINE T shl(T a, uint32_t amount) {
  return amount >= kBits<T> ? T{0} : static_cast<T>(a << amount);
}
template <class T>
PTX_INLINE T shr(T a, uint32_t amount) {
  if (amount >= kBits<T>) return a < 0 ? static_cast<T>(-1) : T{0};
  return static_cast<T>(a >> amount);
}
PTX_INLINE uint32_t shf_l(uint32_t a, uint32_t b, uint32_t amount) {
  return static_cast<uint32_t>(((uint64_t{b} << 32 | a) << amount) >> 32);
}
PTX_INLINE uint32_t shf_r(uint32_t a, uint32_t b, uint32_t amount) {
  return static_cast<uint32_t>((uint64_t{b} << 32 | a) >> amount);
}
template <class T>
PTX_INLINE uint32_t popc(T a) {
  return static_cast<uint32_t>(__builtin_popcountll(a));
}
template <class T>
PTX_INLINE uint32_t clz(T a) {
  return a == 0 ? kBits<T> : static_cast<uint32_t>(__builtin_clzll(a)) - (64 - kBits<T>);
}
template <class T>
PTX_INLINE T brev(T a) {
  T reversed = 0;
  for (unsigned i = 0; i < kBits<T>; ++i) reversed |= ((a >> i) & 1) << (kBits<T> - 1 - i);
  return reversed;
}
/// The place of the highest bit that is not the sign; all ones where there is none.
template <class T>
PTX_INLINE uint32_t bfind(T a) {
  const auto bits = static_cast<Unsigned<T>>(a < 0 ? ~a : a);
  return bits == 0 ? 0xffffffffu : kBits<T> - 1 - clz(bits);
}
template <class T>
PTX_INLINE uint32_t bfind_shift(T a) {
  const uint32_t place = bfind(a);
  return place == 0xffffffffu ? place : kBits<T> - 1 - place;
}
template <class T>
PTX_INLINE T bfe(T a, uint32_t place, uint32_t length) {
  place &= 0xff;
  length &= 0xff;
  if (length == 0) return 0;
  const uint32_t last = place + length - 1 < kBits<T> ? place + length - 1 : kBits<T> - 1;
  const bool sign = std::is_signed_v<T> && ((a >> last) & 1);
  const auto low = shr<Unsigned<T>>(static_cast<Unsigned<T>>(a), place);
  const auto kept = length < kBits<T> ? static_cast<Unsigned<T>>((Unsigned<T>{1} << length) - 1)
                                      : static_cast<Unsigned<T>>(-1);
  // Bits of the field beyond the register's end are copies of the sign, too.
  const uint32_t there = place < kBits<T> ? kBits<T> - place : 0;
  const auto real =
      there < kBits<T> ? kept & static_cast<Unsigned<T>>((Unsigned<T>{1} << there) - 1) : kept;
  return static_cast<T>((low & real) | (sign ? ~real : Unsigned<T>{0}));
}
template <class T>
PTX_INLINE T bfi(T from, T to, uint32_t place, uint32_t length) {
  place &= 0xff;
  length &= 0xff;
  const T ones = length >= kBits<T> ? static_cast<T>(-1) : static_cast<T>((T{1} << length) - 1);
  const T mask = shl(ones, place);
  return (to & ~mask) | (shl(from, place) & mask);
}
PTX_INLINE uint32_t lop3(uint32_t a, uint32_t b, uint32_t c, uint32_t table) {
  uint32_t result = 0;
  if (table & 0x01) result |= ~a & ~b & ~c;
  if (table & 0x02) result |= ~a & ~b & c;
  if (table & 0x04) result |= ~a & b & ~c;
  if (table & 0x08) result |= ~a & b & c;
  if (table & 0x10) result |= a & ~b & ~c;
  if (table & 0x20) result |= a & ~b & c;
  if (table & 0x40) result |= a & b & ~c;
  if (table & 0x80) result |= a & b & c;
  return result;
}
PTX_INLINE uint32_t prmt(uint32_t a, uint32_t b, uint32_t choice) {
  const uint64_t bytes = uint64_t{b} << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t which = choice >> (4 * i);
    uint32_t byte = static_cast<uint32_t>(bytes >> (8 * (which & 7))) & 0xff;
    if (which & 8) byte = byte & 0x80 ? 0xff : 0;
    result |= byte << (8 * i);
  }
  return result;
}

// --- floating point -----------------------------------------------------------------------------
/// Results of arithmetic that are NaN are this one on the device (double: its payload is kept).
PTX_INLINE float canonical(float x) { return x == x ? x : bits_as<float>(0x7fffffffu); }
PTX_INLINE double canonical(double x) { return x; }

template <class T>
PTX_INLINE bool is_nan(T x) {
  return x != x;
}
template <class T>
PTX_INLINE T fadd(T a, T b) {
  return canonical(a + b);
}
template <class T>
PTX_INLINE T fsub(T a, T b) {
  return canonical(a - b);
}
template <class T>
PTX_INLINE T fmul(T a, T b) {
  return canonical(a * b);
}
template <class T>
PTX_INLINE T fdiv(T a, T b) {
  return canonical(a / b);
}
template <class T>
PTX_INLINE T frcp(T a) {
  return canonical(T{1} / a);
}
template <class T>
PTX_INLINE T fsqrt(T a) {
  return canonical(std::sqrt(a));
}
template <class T>
PTX_INLINE T ffma(T a, T b, T c) {
  return canonical(std::fma(a, b, c));
}
template <class T>
PTX_INLINE T fneg(T a) {
  return canonical(-a);
}
template <class T>
PTX_INLINE T fabs(T a) {
  return canonical(std::fabs(a));
}
/// The sign of `sign` on the value of `value`.
template <class T>
PTX_INLINE T copysign(T sign, T value) {
  return std::copysign(value, sign);
}
/// -0 is less than +0; a NaN loses against a number.
template <class T>
PTX_INLINE T fmin(T a, T b) {
  if (is_nan(a)) return canonical(b);
  if (is_nan(b)) return a;
  if (a == b) return std::signbit(a) ? a : b;
  return a < b ? a : b;
}
template <class T>
PTX_INLINE T fmax(T a, T b) {
  if (is_nan(a)) return canonical(b);
  if (is_nan(b)) return a;
  if (a == b) return std::signbit(a) ? b : a;
  return a < b ? b : a;
}
/// The forms that propagate a NaN.
template <class T>
PTX_INLINE T fmin_nan(T a, T b) {
  return is_nan(a) || is_nan(b) ? canonical(std::numeric_limits<T>::quiet_NaN()) : fmin(a, b);
}
template <class T>
PTX_INLINE T fmax_nan(T a, T b) {
  return is_nan(a) || is_nan(b) ? canonical(std::numeric_limits<T>::quiet_NaN()) : fmax(a, b);
}
/// Into 0..1; NaN gives 0.
template <class T>
PTX_INLINE T fsat(T a) {
  return a > T{0} ? (a < T{1} ? a : T{1}) : T{0};
}

// --- comparisons --------------------------------------------------------------------------------
template <class T>
PTX_INLINE bool unordered(T a, T b) {
  return is_nan(a) || is_nan(b);
}
template <class T>
PTX_INLINE bool ordered_ne(T a, T b) {
  return a < b || b < a;
}

// --- conversions --------------------------------------------------------------------------------
/// Integral values of a floating-point type; the sign of zero stays.
template <class T>
PTX_INLINE T round_rni(T x) {
  constexpr T kIntegral = sizeof(T) == 4 ? T{0x1p23} : T{0x1p52};
  const T magnitude = std::fabs(x);
  if (!(magnitude < kIntegral)) return canonical(x);
  return std::copysign((magnitude + kIntegral) - kIntegral, x);
}
template <class T>
PTX_INLINE T round_rzi(T x) {
  return canonical(std::trunc(x));
}
template <class T>
PTX_INLINE T round_rmi(T x) {
  return canonical(std::floor(x));
}
template <class T>
PTX_INLINE T round_rpi(T x) {
  return canonical(std::ceil(x));
}
/// An integral value to an integer: clamped. NaN gives 0, or only the highest bit where source or
/// result has 64 bits.
template <class To, class From>
PTX_INLINE To int_of(From x) {
  using Limits = std::numeric_limits<To>;
  if (is_nan(x)) {
    const bool wide = sizeof(From) == 8 || sizeof(To) == 8;
    return wide ? static_cast<To>(Unsigned<To>{1} << (kBits<To> - 1)) : To{0};
  }
  // 2^bits is exact, Limits::max() need not be.
  const From above = std::ldexp(From{1}, static_cast<int>(kBits<To>) - std::is_signed_v<To>);
  if (x >= above) return Limits::max();
  if (x < static_cast<From>(Limits::min())) return Limits::min();
  return static_cast<To>(x);
}

PTX_INLINE uint16_t half_of(double x) {
  const uint64_t bits = bits_as<uint64_t>(x);
  const auto sign = static_cast<uint16_t>(bits >> 48 & 0x8000);
  const double magnitude = std::fabs(x);
  if (is_nan(x)) return 0x7fff;
  if (magnitude >= 65520.0) return sign | 0x7c00;
  if (magnitude < 0x1p-14) {
    return sign | static_cast<uint16_t>(round_rni(magnitude * 0x1p24));
  }
  const uint64_t positive = bits & 0x7fffffffffffffff;
  const uint64_t rounded = positive + ((uint64_t{1} << 41) - 1) + (positive >> 42 & 1);
  return sign | static_cast<uint16_t>((rounded >> 42) - (uint64_t{1023 - 15} << 10));
}
PTX_INLINE float float_of_half(uint16_t half) {
  const uint32_t sign = uint32_t{half & 0x8000u} << 16;
  const uint32_t exponent = half >> 10 & 31;
  const uint32_t fraction = half & 0x3ff;
  if (exponent == 31 && fraction != 0) return bits_as<float>(0x7fffffffu);
  if (exponent == 31) return bits_as<float>(sign | 0x7f800000u);
  const float magnitude = exponent == 0 ? static_cast<float>(fraction) * 0x1p-24f
                                        : bits_as<float>((exponent + 112) << 23 | fraction << 13);
  return bits_as<float>(sign | bits_as<uint32_t>(magnitude));
}
PTX_INLINE uint16_t bfloat_of(float x) {
  if (is_nan(x)) return 0x7fff;
  const uint32_t bits = bits_as<uint32_t>(x);
  const uint32_t up = (bits >> 16 & 1) + 0x7fff;
  return static_cast<uint16_t>((bits + up) >> 16);
}
PTX_INLINE float float_of_bfloat(uint16_t bfloat) { return bits_as<float>(uint32_t{bfloat} << 16); }

}  // namespace ptx
