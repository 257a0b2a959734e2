// How elements lie in memory and on the wire, for a thread that holds 16 bytes of wire at a time.
//
//   elements   Float32 Float16 BFloat16 Float64 Int32 Int64: 16 bytes of a tensor <-> accumulators
//   wires      Native Fp16 Bf16 Int8 <Element>: 16 bytes of a slice's payload <-> accumulators
//
// Everything works on registers; primitives.cuh does the loads and stores. The rules of rounding
// and scaling are those of csrc/wire, called from here.
//
// A wire deals in tiles, one warp at a time: kVectors vectors of 16 bytes for each lane, so that
// the blocks of a block-scaled format fall on whole groups of kBlockLanes lanes.
//
//   lane        0            1            ...  31
//   vector 0    e[0, v)      e[v, 2v)     ...  e[31v, 32v)        v = kVec
//   vector 1    e[32v, 33v)  ...                                  tile = 32 * kVec * kVectors
#pragma once

#include "base/dtype.h"
#include "base/reduce_op.h"
#include "cuda/platform.cuh"
#include "wire/arithmetic.h"
#include "wire/scale.h"
#include "wire/wire_format.h"

namespace dpcomm::gpu {

/// 16 bytes as two words of 64 bits, and back.
DPCOMM_DEVICE uint64_t low_half(const Vec16& v) { return v.w[0] | (uint64_t{v.w[1]} << 32); }
DPCOMM_DEVICE uint64_t high_half(const Vec16& v) { return v.w[2] | (uint64_t{v.w[3]} << 32); }
DPCOMM_DEVICE Vec16 vector_of(uint64_t low, uint64_t high) {
  return Vec16{{static_cast<uint32_t>(low), static_cast<uint32_t>(low >> 32),
                static_cast<uint32_t>(high), static_cast<uint32_t>(high >> 32)}};
}

// --- elements -----------------------------------------------------------------------------------
// kBytes; Acc, the accumulator's type; unpack: 16 bytes to 16 / kBytes accumulators; pack: back,
// rounded to the type, NaN canonical; rounded: one accumulator as the type holds it.

struct Float32 {
  using Acc = float;
  static constexpr uint32_t kBytes = 4;
  static DPCOMM_DEVICE void unpack(const Vec16& v, float* to) {
    DPCOMM_UNROLL
    for (int i = 0; i < 4; ++i) to[i] = bits_as<float>(v.w[i]);
  }
  static DPCOMM_DEVICE Vec16 pack(const float* from) {
    Vec16 v;
    DPCOMM_UNROLL
    for (int i = 0; i < 4; ++i) v.w[i] = bits_as<uint32_t>(canonical_nan(from[i]));
    return v;
  }
  static DPCOMM_DEVICE float rounded(float x) { return x; }
};

struct Float16 {
  using Acc = float;
  static constexpr uint32_t kBytes = 2;
  static DPCOMM_DEVICE void unpack(const Vec16& v, float* to) {
    DPCOMM_UNROLL
    for (int i = 0; i < 4; ++i) {
      to[2 * i] = float_of_fp16_bits(static_cast<uint16_t>(v.w[i]));
      to[2 * i + 1] = float_of_fp16_bits(static_cast<uint16_t>(v.w[i] >> 16));
    }
  }
  static DPCOMM_DEVICE Vec16 pack(const float* from) {
    Vec16 v;
    DPCOMM_UNROLL
    for (int i = 0; i < 4; ++i) v.w[i] = pair(from[2 * i], from[2 * i + 1]);
    return v;
  }
  static DPCOMM_DEVICE uint32_t pair(float low, float high) {
    uint32_t both = fp16x2_of(low, high);
    if (low != low) both = (both & 0xffff0000u) | kNan16;
    if (high != high) both = (both & 0xffffu) | (uint32_t{kNan16} << 16);
    return both;
  }
  static DPCOMM_DEVICE float rounded(float x) {
    return float_of_fp16_bits(static_cast<uint16_t>(fp16x2_of(x, x)));
  }
};

struct BFloat16 {
  using Acc = float;
  static constexpr uint32_t kBytes = 2;
  static DPCOMM_DEVICE void unpack(const Vec16& v, float* to) {
    DPCOMM_UNROLL
    for (int i = 0; i < 4; ++i) {
      to[2 * i] = bits_as<float>(v.w[i] << 16);
      to[2 * i + 1] = bits_as<float>(v.w[i] & 0xffff0000u);
    }
  }
  static DPCOMM_DEVICE Vec16 pack(const float* from) {
    Vec16 v;
    DPCOMM_UNROLL
    for (int i = 0; i < 4; ++i) {
      const uint32_t low = bf16_of(bits_as<uint32_t>(from[2 * i]));
      const uint32_t high = bf16_of(bits_as<uint32_t>(from[2 * i + 1]));
      v.w[i] = low | (high << 16);
    }
    return v;
  }
  static DPCOMM_DEVICE float rounded(float x) {
    return float_of_bf16(bf16_of(bits_as<uint32_t>(x)));
  }
};

struct Int32 {
  using Acc = int32_t;
  static constexpr uint32_t kBytes = 4;
  static DPCOMM_DEVICE void unpack(const Vec16& v, int32_t* to) {
    DPCOMM_UNROLL
    for (int i = 0; i < 4; ++i) to[i] = static_cast<int32_t>(v.w[i]);
  }
  static DPCOMM_DEVICE Vec16 pack(const int32_t* from) {
    Vec16 v;
    DPCOMM_UNROLL
    for (int i = 0; i < 4; ++i) v.w[i] = static_cast<uint32_t>(from[i]);
    return v;
  }
};

struct Int64 {
  using Acc = int64_t;
  static constexpr uint32_t kBytes = 8;
  static DPCOMM_DEVICE void unpack(const Vec16& v, int64_t* to) {
    to[0] = static_cast<int64_t>(low_half(v));
    to[1] = static_cast<int64_t>(high_half(v));
  }
  static DPCOMM_DEVICE Vec16 pack(const int64_t* from) {
    return vector_of(static_cast<uint64_t>(from[0]), static_cast<uint64_t>(from[1]));
  }
};

struct Float64 {
  using Acc = double;
  static constexpr uint32_t kBytes = 8;
  static DPCOMM_DEVICE void unpack(const Vec16& v, double* to) {
    to[0] = bits_as<double>(low_half(v));
    to[1] = bits_as<double>(high_half(v));
  }
  static DPCOMM_DEVICE Vec16 pack(const double* from) {
    return vector_of(bits_as<uint64_t>(canonical_nan(from[0])),
                     bits_as<uint64_t>(canonical_nan(from[1])));
  }
  static DPCOMM_DEVICE double rounded(double x) { return x; }
};

/// Exact copies only: nothing is unpacked.
struct Bytes {
  static constexpr uint32_t kBytes = 1;
};

// --- wires --------------------------------------------------------------------------------------
// kVec elements in 16 bytes of payload; kVectors of those for a lane; kBatch sources whose loads
// are under way together. decode and encode take the exponent byte of the block (kBlockLanes > 0:
// lanes of a warp that hold a block; byte_of: as csrc/wire).

/// The tensor's own bytes.
template <class E>
struct Native {
  using Element = E;
  static constexpr WireFormat kFormat = WireFormat::kNative;
  static constexpr bool kLossy = false;
  static constexpr uint32_t kBytes = E::kBytes;
  static constexpr uint32_t kVec = 16 / kBytes;
  static constexpr uint32_t kVectors = 2;
  static constexpr int kBatch = 2;
  static constexpr uint32_t kBlockLanes = 0;

  DPCOMM_HD static constexpr uint32_t header_bytes(uint32_t) { return 0; }
  DPCOMM_HD static constexpr uint32_t slice_bytes(uint32_t total) { return total * kBytes; }
  template <class Acc>
  static DPCOMM_DEVICE void decode(const Vec16& v, uint32_t, Acc* to) {
    E::unpack(v, to);
  }
  template <class Acc>
  static DPCOMM_DEVICE Vec16 encode(const Acc* from, uint32_t) {
    return E::pack(from);
  }
};

/// Each element rounded to bf16.
template <class E>
struct Bf16 : Native<BFloat16> {
  using Element = E;
  static constexpr WireFormat kFormat = WireFormat::kBf16;
  static constexpr bool kLossy = true;
};

/// Blocks of 512 share a power of two; one block is a warp's tile.
template <class E>
struct Fp16 {
  using Scale = Fp16Scale;
  using Element = E;
  using Places = BlockPlaces<Scale::kBlock, 2>;
  static constexpr WireFormat kFormat = WireFormat::kFp16;
  static constexpr bool kLossy = true;
  static constexpr uint32_t kBlock = Scale::kBlock;
  static constexpr uint32_t kBytes = 2;
  static constexpr uint32_t kVec = 8;
  static constexpr uint32_t kVectors = 2;
  static constexpr int kBatch = 2;
  static constexpr uint32_t kBlockLanes = kBlock / (kVec * kVectors);

  DPCOMM_HD static constexpr uint32_t header_bytes(uint32_t total) {
    return static_cast<uint32_t>(Places::header_bytes(total));
  }
  DPCOMM_HD static constexpr uint32_t slice_bytes(uint32_t total) {
    return static_cast<uint32_t>(Places::slice_bytes(total));
  }
  static DPCOMM_DEVICE void decode(const Vec16& v, uint32_t byte, float* to) {
    const float scale = Scale::decoding_scale(byte);
    Float16::unpack(v, to);
    DPCOMM_UNROLL
    for (int i = 0; i < int(kVec); ++i) to[i] *= scale;
  }
  static DPCOMM_DEVICE Vec16 encode(const float* from, uint32_t byte) {
    const float scale = Scale::encoding_scale(byte);
    const bool top = byte == Scale::kTopByte;
    float scaled[kVec];
    DPCOMM_UNROLL
    for (int i = 0; i < int(kVec); ++i) {
      scaled[i] = (top ? Scale::below_overflow(from[i]) : from[i]) * scale;
    }
    return Float16::pack(scaled);
  }
};

/// Blocks of 128 share a power of two; a warp's tile has four.
template <class E>
struct Int8 {
  using Scale = Int8Scale;
  using Element = E;
  using Places = BlockPlaces<Scale::kBlock, 1>;
  static constexpr WireFormat kFormat = WireFormat::kInt8;
  static constexpr bool kLossy = true;
  static constexpr uint32_t kBlock = Scale::kBlock;
  static constexpr uint32_t kBytes = 1;
  static constexpr uint32_t kVec = 16;
  static constexpr uint32_t kVectors = 1;
  static constexpr int kBatch = 2;
  static constexpr uint32_t kBlockLanes = kBlock / (kVec * kVectors);

  DPCOMM_HD static constexpr uint32_t header_bytes(uint32_t total) {
    return static_cast<uint32_t>(Places::header_bytes(total));
  }
  DPCOMM_HD static constexpr uint32_t slice_bytes(uint32_t total) {
    return static_cast<uint32_t>(Places::slice_bytes(total));
  }
  static DPCOMM_DEVICE void decode(const Vec16& v, uint32_t byte, float* to) {
    const float scale = Scale::decoding_scale(byte);
    DPCOMM_UNROLL
    for (int i = 0; i < int(kVec); ++i) {
      to[i] = Scale::decoded(static_cast<uint8_t>(v.w[i / 4] >> (8 * (i % 4))), scale);
    }
  }
  static DPCOMM_DEVICE Vec16 encode(const float* from, uint32_t byte) {
    const float scale = Scale::encoding_scale(byte);
    Vec16 v{{0, 0, 0, 0}};
    DPCOMM_UNROLL
    for (int i = 0; i < int(kVec); ++i) {
      v.w[i / 4] |= uint32_t{Scale::encoded(from[i], scale)} << (8 * (i % 4));
    }
    return v;
  }
};

// --- reductions ---------------------------------------------------------------------------------

/// What an operator leaves everything else as it is with (-0 for SUM: 0 would change -0), so that a
/// reduction has no first contribution that differs from the others.
template <class Acc>
DPCOMM_DEVICE Acc identity(ReduceOp op) {
  constexpr bool kFloating = static_cast<Acc>(0.5) != 0;
  constexpr Acc kHalf =
      sizeof(Acc) == 8 ? static_cast<Acc>(int64_t{1} << 62) : static_cast<Acc>(int32_t{1} << 30);
  constexpr Acc kMost = kHalf - 1 + kHalf;  // of an integer
  switch (op) {
    case ReduceOp::kProduct:
      return 1;
    case ReduceOp::kMin:
      return kFloating ? static_cast<Acc>(__builtin_inf()) : kMost;
    case ReduceOp::kMax:
      return kFloating ? static_cast<Acc>(-__builtin_inf()) : -kMost - 1;
    default:
      return kFloating ? static_cast<Acc>(-0.0) : 0;
  }
}

/// sum[i] = sum[i] op x[i] for i < n; kSumOnly: op is SUM.
template <bool kSumOnly, int n, class Acc>
DPCOMM_DEVICE void combine(ReduceOp op, Acc* sum, const Acc* x) {
  const auto each = [&](auto with) {
    DPCOMM_UNROLL
    for (int i = 0; i < n; ++i) sum[i] = with(sum[i], x[i]);
  };
  if (kSumOnly || op == ReduceOp::kSum) {
    each([](Acc a, Acc b) { return combined<ReduceOp::kSum>(a, b); });
  } else if (op == ReduceOp::kProduct) {
    each([](Acc a, Acc b) { return combined<ReduceOp::kProduct>(a, b); });
  } else if (op == ReduceOp::kMin) {
    each([](Acc a, Acc b) { return combined<ReduceOp::kMin>(a, b); });
  } else {
    each([](Acc a, Acc b) { return combined<ReduceOp::kMax>(a, b); });
  }
}

}  // namespace dpcomm::gpu
