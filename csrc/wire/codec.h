// A codec moves elements between an accumulator and a place in memory: a tensor, or a slice in wire
// format. All arithmetic of a collective goes through codecs, so that one executor serves every
// dtype, wire format and reduction, and so that scalar and SIMD code can be held to equal bits.
//
// The accumulator is an array of float for dtypes that accumulate in fp32 (and for every lossy wire
// format), else an array of the dtype itself (base/dtype.h, accumulator_bytes). Callers work in
// tiles: `first` and `n` name elements [first, first + n) of a slice of `total` elements that
// starts at `base`. `first` is a multiple of the block (wire/wire_format.h); `first + n` too, or
// `total`. `base` of a tensor has any alignment that its dtype allows or none at all; `base` of a
// slice in wire format is 16-byte aligned.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/dtype.h"
#include "base/reduce_op.h"
#include "wire/wire_format.h"

namespace dpcomm {

/// Instruction sets that the kernels are built for. All give the same bits.
enum class Isa : uint8_t { kScalar, kAvx2, kAvx512 };
inline constexpr int kIsas = 3;

constexpr const char* name(Isa isa) {
  constexpr const char* kNames[] = {"scalar", "avx2", "avx512"};
  return kNames[static_cast<int>(isa)];
}

/// The best set that this CPU has and this build contains, or what DPCOMM_ISA asks for.
Isa best_isa();

/// True if this CPU and this build can run `isa`.
bool isa_available(Isa isa);

struct Codec {
  /// Bytes that a slice of `total` elements takes (header included).
  size_t (*slice_bytes)(size_t total);

  /// acc[i] = decode(base, first + i) for i < n.
  void (*load)(void* acc, const void* base, size_t total, size_t first, size_t n);

  /// acc[i] = acc[i] op decode(base, first + i), by combiner op; nullptr where the pair is not
  /// supported. Indexed by ReduceOp; kAvg and kPremulSum are null (use their combiner).
  void (*combine[kReduceOps])(void* acc, const void* base, size_t total, size_t first, size_t n);

  /// Rounds acc[0, n) to this representation, writes it and makes NaN canonical. With `keep`, acc
  /// becomes decode(encode(acc)): what a reader of the bytes would see.
  void (*store)(void* base, size_t total, size_t first, void* acc, size_t n, bool keep);
};

/// Arithmetic on accumulators of one dtype.
struct AccumulatorOps {
  /// acc[i] *= factor, then rounded to the dtype (PREMUL_SUM's contribution). Floating types only.
  void (*premultiply)(void* acc, double factor, size_t n);
  /// acc[i] /= divisor; integers truncate toward zero. Null for bool.
  void (*divide)(void* acc, int64_t divisor, size_t n);
};

/// The codec of a tensor of `dtype` in memory; also the codec of wire format `native`.
const Codec& tensor_codec(Dtype dtype, Isa isa);

/// The codec of a slice in `wire` for a tensor of `dtype`. For kNative it is tensor_codec(dtype).
/// The lossy ones have fp32 accumulators and combine by SUM only.
const Codec& wire_codec(WireFormat wire, Dtype dtype, Isa isa);

const AccumulatorOps& accumulator_ops(Dtype dtype, Isa isa);

/// Sums `sources` arrays of n floats in the order given and writes the result, divided by `divisor`
/// unless that is 1, with canonical NaN, to each of `destinations` arrays (one may be the same as a
/// source, element for element). Bits are those of load, combine, divide, store. This is the fast
/// path of an fp32 all-reduce on the native wire: one pass over memory, no tile in between.
using SumF32 = void (*)(float* const* dst, int destinations, const float* const* src, int sources,
                        int64_t divisor, size_t n);
SumF32 sum_f32(Isa isa);
/// The same with stores that go past the caches, for arrays that do not fit them. What was written
/// is visible to others once this thread has stored a seq_cst atomic.
SumF32 sum_f32_streaming(Isa isa);
/// Likewise a copy of `bytes` bytes.
using StreamCopy = void (*)(void* to, const void* from, size_t bytes);
StreamCopy copy_streaming(Isa isa);

}  // namespace dpcomm
