// What the block-scaled wire formats are made of, for the kernels of every reader: where exponents
// and payload lie in a slice, and how a block's exponent byte and its elements follow from each
// other. The rules are told in fp16.h and int8.h.
#pragma once

#include "wire/bits.h"
#include "wire/wire_format.h"

namespace dpcomm {
namespace {

/// Places in a slice of a block-scaled format: a header of one exponent byte per block, padded to
/// 16 bytes, then the payload.
template <size_t kBlock, size_t kElementBytes>
struct BlockPlaces {
  DPCOMM_HD static constexpr size_t blocks(size_t total) { return (total + kBlock - 1) / kBlock; }
  DPCOMM_HD static constexpr size_t header_bytes(size_t total) {
    return (blocks(total) + 15) / 16 * 16;
  }
  DPCOMM_HD static constexpr size_t slice_bytes(size_t total) {
    return header_bytes(total) + total * kElementBytes;
  }
};

/// The scale of a block of the fp16 wire format.
struct Fp16Scale {
  static constexpr size_t kBlock = block_elems(WireFormat::kFp16);
  static constexpr uint32_t kLeastByte = 15;
  static constexpr uint32_t kTopByte = 254;
  static constexpr uint32_t kTopMagnitude = 0x7f7fe000;  // (1 - 2^-11) * 2^128
  static constexpr uint32_t kHalfUnit = 0x1000;          // of 11 bits: carries into the exponent

  DPCOMM_HD static float encoding_scale(uint32_t byte) { return power_of_two(268 - byte); }
  DPCOMM_HD static float decoding_scale(uint32_t byte) { return power_of_two(byte - 14); }

  /// The exponent byte of a block whose largest finite magnitude has these bits.
  DPCOMM_HD static uint32_t byte_of(uint32_t largest) {
    const uint32_t rounded = (largest + kHalfUnit) >> 23;
    const uint32_t bounded_below = rounded > kLeastByte ? rounded : kLeastByte;
    return bounded_below < kTopByte ? bounded_below : kTopByte;
  }

  /// What an element of a block with exponent byte kTopByte is encoded as.
  DPCOMM_HD static float below_overflow(float x) {
    const uint32_t bits = bits_as<uint32_t>(x);
    const uint32_t magnitude = bits & kMagnitude32;
    const bool bound = magnitude > kTopMagnitude && magnitude < kInfinity32;
    return bits_as<float>(bound ? (bits & ~kMagnitude32) | kTopMagnitude : bits);
  }
};

/// The scale of a block of the int8 wire format, and its elements.
struct Int8Scale {
  static constexpr size_t kBlock = block_elems(WireFormat::kInt8);
  static constexpr uint32_t kLeastByte = 7;
  static constexpr int32_t kNonFinite = -128;

  DPCOMM_HD static float encoding_scale(uint32_t byte) { return power_of_two(260 - byte); }
  DPCOMM_HD static float decoding_scale(uint32_t byte) { return power_of_two(byte - 6); }

  /// The exponent byte of a block whose largest finite magnitude has these bits.
  DPCOMM_HD static uint32_t byte_of(uint32_t largest) {
    const uint32_t exponent = largest >> 23;
    return exponent > kLeastByte ? exponent : kLeastByte;
  }

  DPCOMM_HD static float decoded(uint8_t payload, float scale) {
    const int32_t q = static_cast<int8_t>(payload);
    const float x = static_cast<float>(q) * scale;
    return q == kNonFinite ? bits_as<float>(kNan32) : x;
  }

  /// Adding 1.5 * 2^23 rounds a small number to nearest even and leaves it in the lowest bits.
  DPCOMM_HD static uint8_t encoded(float x, float scale) {
    const float shifted = x * scale + 0x1.8p23f;
    const int32_t rounded = static_cast<int32_t>(bits_as<uint32_t>(shifted) - 0x4b400000u);
    const int32_t below = rounded < 127 ? rounded : 127;
    const int32_t bounded = below > -127 ? below : -127;
    const bool finite = (bits_as<uint32_t>(x) & kMagnitude32) < kInfinity32;
    return static_cast<uint8_t>(finite ? bounded : kNonFinite);
  }
};

}  // namespace
}  // namespace dpcomm
