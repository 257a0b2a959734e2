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

template <class V>
struct Int8Wire {
  static constexpr size_t kBlock = block_elems(WireFormat::kInt8);
  static constexpr uint32_t kLeastByte = 7;
  using Layout = BlockLayout<kBlock, 1>;

  static float encoding_scale(uint32_t byte) { return power_of_two(260 - byte); }
  static float decoding_scale(uint32_t byte) { return power_of_two(byte - 6); }

  static void load(void* acc, const void* base, size_t total, size_t first, size_t n) {
    float* to = static_cast<float*>(acc);
    Layout::for_blocks(
        static_cast<const uint8_t*>(base), total, first, n,
        [=](const uint8_t* byte, const uint8_t* payload, size_t offset, size_t count) {
          const float scale = decoding_scale(*byte);
          for_vectors<V>(count, [=](auto v, size_t i) {
            using W = decltype(v);
            W::store(to + offset + i, W::mul(W::load_int8(payload + i), W::all(scale)));
          });
        });
  }

  static void sum(void* acc, const void* base, size_t total, size_t first, size_t n) {
    float* to = static_cast<float*>(acc);
    Layout::for_blocks(
        static_cast<const uint8_t*>(base), total, first, n,
        [=](const uint8_t* byte, const uint8_t* payload, size_t offset, size_t count) {
          const float scale = decoding_scale(*byte);
          for_vectors<V>(count, [=](auto v, size_t i) {
            using W = decltype(v);
            const auto x = W::mul(W::load_int8(payload + i), W::all(scale));
            W::store(to + offset + i, W::add(W::load(to + offset + i), x));
          });
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
    const uint32_t largest = largest_finite_bits<V>(values, count) >> 23;
    const uint32_t byte = largest > kLeastByte ? largest : kLeastByte;
    const float scale = encoding_scale(byte);
    for_vectors<V>(count, [=](auto v, size_t i) {
      using W = decltype(v);
      W::store_int8(payload + i, W::mul(W::load(values + i), W::all(scale)));
    });
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
