// The int8 wire format: blocks of 128 elements share a power of two, the payload is int8.
//
// A block's byte b is the biased fp32 exponent of its largest finite magnitude, at least 7. The
// payload is x * 2^(133 - b) rounded to nearest even, at most 127 in magnitude: the largest
// magnitude lands in [64, 128), and what lies above 127 goes as 127, less than one step away.
// -128 stands for Inf and NaN and decodes to NaN. Below 2^-120 the scale stays at 2^-126.
#pragma once

#include "wire/block.h"

namespace dpcomm {
namespace {

struct Int8Wire {
  static constexpr size_t kBlock = block_elems(WireFormat::kInt8);
  static constexpr uint32_t kLeastByte = 7;
  static constexpr int32_t kNonFinite = -128;
  using Layout = BlockLayout<kBlock, 1>;

  static float encoding_scale(uint32_t byte) { return power_of_two(260 - byte); }
  static float decoding_scale(uint32_t byte) { return power_of_two(byte - 6); }

  static float decoded(uint8_t payload, float scale) {
    const int32_t q = static_cast<int8_t>(payload);
    const float x = static_cast<float>(q) * scale;
    return q == kNonFinite ? bits_as<float>(kNan32) : x;
  }

  /// Adding 1.5 * 2^23 rounds a small number to nearest even and leaves it in the lowest bits.
  static uint8_t encoded(float x, float scale) {
    const float shifted = x * scale + 0x1.8p23f;
    const int32_t rounded = static_cast<int32_t>(bits_as<uint32_t>(shifted) - 0x4b400000u);
    const int32_t below = rounded < 127 ? rounded : 127;
    const int32_t bounded = below > -127 ? below : -127;
    const bool finite = (bits_as<uint32_t>(x) & kMagnitude32) < kInfinity32;
    return static_cast<uint8_t>(finite ? bounded : kNonFinite);
  }

  static void load(void* acc, const void* base, size_t total, size_t first, size_t n) {
    float* to = static_cast<float*>(acc);
    Layout::for_blocks(
        static_cast<const uint8_t*>(base), total, first, n,
        [=](const uint8_t* byte, const uint8_t* payload, size_t offset, size_t count) {
          const float scale = decoding_scale(*byte);
          for (size_t i = 0; i < count; ++i) to[offset + i] = decoded(payload[i], scale);
        });
  }

  static void sum(void* acc, const void* base, size_t total, size_t first, size_t n) {
    float* to = static_cast<float*>(acc);
    Layout::for_blocks(
        static_cast<const uint8_t*>(base), total, first, n,
        [=](const uint8_t* byte, const uint8_t* payload, size_t offset, size_t count) {
          const float scale = decoding_scale(*byte);
          for (size_t i = 0; i < count; ++i) to[offset + i] += decoded(payload[i], scale);
        });
  }

  static void store(void* base, size_t total, size_t first, void* acc, size_t n, bool keep) {
    const float* from = static_cast<const float*>(acc);
    uint8_t* bytes = static_cast<uint8_t*>(base);
    Layout::for_blocks(bytes, total, first, n,
                       [=](uint8_t* byte, uint8_t* payload, size_t offset, size_t count) {
                         *byte = encode(payload, from + offset, count);
                       });
    Layout::store_padding(bytes, total, first, n);
    if (keep) load(acc, base, total, first, n);
  }

  /// Writes the payload of one block; returns its exponent byte.
  static uint8_t encode(uint8_t* payload, const float* values, size_t count) {
    const uint32_t largest = largest_finite_bits(values, count) >> 23;
    const uint32_t byte = largest > kLeastByte ? largest : kLeastByte;
    const float scale = encoding_scale(byte);
    for (size_t i = 0; i < count; ++i) payload[i] = encoded(values[i], scale);
    return static_cast<uint8_t>(byte);
  }

  static constexpr Codec codec() {
    Codec codec{Layout::slice_bytes, load, {}, store};
    codec.combine[static_cast<int>(ReduceOp::kSum)] = sum;
    return codec;
  }
};

}  // namespace
}  // namespace dpcomm
