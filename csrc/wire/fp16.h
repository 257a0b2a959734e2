// The fp16 wire format: blocks of 512 elements share a power of two, the payload is fp16.
//
// A block's byte b is the biased fp32 exponent of its largest finite magnitude after rounding to 11
// bits, at least 15 and at most 254. The payload is x * 2^(141 - b), rounded to nearest even: the
// largest magnitude lands in [2^14, 2^15), so nothing overflows, what lies up to 28 binades below
// keeps all 11 bits, and to encode what was decoded changes nothing. Both powers of two,
// 2^(141 - b) and 2^(b - 141), are normal floats, so one multiplication each is exact but for what
// falls below fp16's own unit, 2^-24. Inf and NaN do not count for the scale and travel in the
// payload. In the topmost binade (b = 254) a magnitude that would round to 2^128 goes as the
// largest one that decodes to a finite float: finite stays finite, within the bound of rounding.
#pragma once

#include "wire/block.h"

namespace dpcomm {
namespace {

template <class V>
struct Fp16Wire : Fp16Scale {
  using Layout = BlockLayout<kBlock, 2>;

  static void load(void* acc, const void* base, size_t total, size_t first, size_t n) {
    float* to = static_cast<float*>(acc);
    Layout::for_blocks(
        static_cast<const uint8_t*>(base), total, first, n,
        [=](const uint8_t* byte, const uint8_t* payload, size_t offset, size_t count) {
          const float scale = decoding_scale(*byte);
          for_vectors<V>(count, [=](auto v, size_t i) {
            using W = decltype(v);
            W::store(to + offset + i, W::mul(W::load_fp16(payload + 2 * i), W::all(scale)));
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
            const auto x = W::mul(W::load_fp16(payload + 2 * i), W::all(scale));
            W::store(to + offset + i, W::add(W::load(to + offset + i), x));
          });
        });
  }

  static void store(void* base, size_t total, size_t first, void* acc, size_t n, bool keep) {
    float* from = static_cast<float*>(acc);
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
    float bounded[kBlock];
    const uint32_t byte = byte_of(largest_finite_bits(values, count));
    if (byte == kTopByte) {
      for (size_t i = 0; i < count; ++i) bounded[i] = below_overflow(values[i]);
      values = bounded;
    }
    const float scale = encoding_scale(byte);
    for_vectors<V>(count, [=](auto v, size_t i) {
      using W = decltype(v);
      W::store_fp16(payload + 2 * i, W::mul(W::load(values + i), W::all(scale)));
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
