// What the block-scaled wire formats share: a slice is a header of one exponent byte per block,
// padded to 16 bytes, then the payload, one element after the other. The last block of a slice may
// be short.
#pragma once

#include "wire/codec.h"
#include "wire/scale.h"
#include "wire/vector_scalar.h"

namespace dpcomm {
namespace {

/// Walks over the blocks of a slice.
template <size_t kBlock, size_t kElementBytes>
struct BlockLayout : BlockPlaces<kBlock, kElementBytes> {
  using BlockPlaces<kBlock, kElementBytes>::blocks;
  using BlockPlaces<kBlock, kElementBytes>::header_bytes;

  /// Calls body(exponent, payload, offset, count) for each block of elements [first, first + n):
  /// where its exponent byte and its payload lie, its offset from `first`, its number of elements.
  template <class Byte, class Body>
  static void for_blocks(Byte* base, size_t total, size_t first, size_t n, Body body) {
    Byte* payload = base + header_bytes(total) + first * kElementBytes;
    Byte* exponent = base + first / kBlock;
    for (size_t offset = 0; offset < n; offset += kBlock) {
      const size_t count = n - offset < kBlock ? n - offset : kBlock;
      body(exponent, payload, offset, count);
      exponent += 1;
      payload += kBlock * kElementBytes;
    }
  }

  /// Zeroes the padding of the header; the tile that ends the slice does it.
  static void store_padding(uint8_t* base, size_t total, size_t first, size_t n) {
    if (first + n != total) return;
    for (size_t i = blocks(total); i < header_bytes(total); ++i) base[i] = 0;
  }
};

}  // namespace
}  // namespace dpcomm
