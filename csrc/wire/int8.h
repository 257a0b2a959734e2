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

struct Int8Wire : Int8Scale {
  using Layout = BlockLayout<kBlock, 1>;

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
    const uint32_t byte = byte_of(largest_finite_bits(values, count));
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
