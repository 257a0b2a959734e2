// The only place that knows how a device does things: PTX, memory orders, warps, blocks. Kernels
// are plain C++ over these functions. Two twins: nvcc (below), and the host (emulated/platform.h,
// which the tests have), where a CUDA thread is a fiber of a seeded scheduler.
//
// Memory model, as used here (docs/cuda.md argues each flag):
//   publish:  all threads store data; block_sync(); one thread: fence_system(), then
//             store_flag_relaxed() for each flag.
//   wait:     one thread polls load_flag_relaxed(), and once it is satisfied reads the flag again
//             with load_flag_acquire(); block_sync(); all threads load data.
#pragma once

#include <cstdint>

#include "base/macros.h"

#if !defined(__CUDACC__)
#include "emulated/platform.h"
#else

#define DPCOMM_DEVICE __device__ __forceinline__
/// A variable in the block's shared memory, uninitialised.
#define DPCOMM_SHARED(Type, name) __shared__ Type name

namespace dpcomm::gpu {

/// A multiprocessor has 64 KiB of shared memory, so that a block should do with less than 32.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
inline constexpr bool kSharedIsScarce = true;
#else
inline constexpr bool kSharedIsScarce = false;
#endif

/// 16 bytes that are loaded and stored in one access.
struct alignas(16) Vec16 {
  uint32_t w[4];
};

// --- where a thread is --------------------------------------------------------------------------
// Read where they are asked for, lest what follows from them fill registers through the kernel.
DPCOMM_DEVICE uint32_t thread() {
  uint32_t number;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(number));
  return number;
}
DPCOMM_DEVICE uint32_t threads() {
  uint32_t number;
  asm volatile("mov.u32 %0, %%ntid.x;" : "=r"(number));
  return number;
}
DPCOMM_DEVICE uint32_t block_x() { return blockIdx.x; }
DPCOMM_DEVICE uint32_t block_y() { return blockIdx.y; }

// --- flags: 8 bytes, one writer, seen by other devices -----------------------------------------
DPCOMM_DEVICE uint64_t load_flag_relaxed(const uint64_t* flag) {
  uint64_t value;
  asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(flag) : "memory");
  return value;
}
DPCOMM_DEVICE uint64_t load_flag_acquire(const uint64_t* flag) {
  uint64_t value;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(flag) : "memory");
  return value;
}
DPCOMM_DEVICE void store_flag_relaxed(uint64_t* flag, uint64_t value) {
  asm volatile("st.relaxed.sys.global.u64 [%0], %1;" : : "l"(flag), "l"(value) : "memory");
}
/// All that this thread, and those it has met at a block_sync(), read and wrote before is before
/// all that it stores after.
DPCOMM_DEVICE void fence_system() { asm volatile("fence.acq_rel.sys;" : : : "memory"); }

// --- words in host memory: abort, wait records --------------------------------------------------
DPCOMM_DEVICE uint32_t load_word_relaxed(const uint32_t* word) {
  uint32_t value;
  asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
  return value;
}
DPCOMM_DEVICE void store_word_relaxed(uint32_t* word, uint32_t value) {
  asm volatile("st.relaxed.sys.global.u32 [%0], %1;" : : "l"(word), "r"(value) : "memory");
}

// --- packets: 12 bytes of data and 4 of epoch that arrive together ------------------------------
DPCOMM_DEVICE Vec16 load_packet(const void* place) {
  uint64_t low, high;
  asm volatile(
      "{\n\t.reg .b128 packet;\n\tld.relaxed.sys.global.b128 packet, [%2];\n\t"
      "mov.b128 {%0, %1}, packet;\n\t}"
      : "=l"(low), "=l"(high)
      : "l"(place)
      : "memory");
  return Vec16{{static_cast<uint32_t>(low), static_cast<uint32_t>(low >> 32),
                static_cast<uint32_t>(high), static_cast<uint32_t>(high >> 32)}};
}
DPCOMM_DEVICE void store_packet(void* place, Vec16 v) {
  const uint64_t low = v.w[0] | (static_cast<uint64_t>(v.w[1]) << 32);
  const uint64_t high = v.w[2] | (static_cast<uint64_t>(v.w[3]) << 32);
  asm volatile(
      "{\n\t.reg .b128 packet;\n\tmov.b128 packet, {%1, %2};\n\t"
      "st.relaxed.sys.global.b128 [%0], packet;\n\t}"
      :
      : "l"(place), "l"(low), "l"(high)
      : "memory");
}

// --- data: 16 bytes at a 16-byte aligned place
// ----------------------------------------------------
DPCOMM_DEVICE const void* global(const void* place) {
  __builtin_assume(__isGlobal(place));  // so that accesses need not find out
  return place;
}
DPCOMM_DEVICE void* global(void* place) {
  __builtin_assume(__isGlobal(place));
  return place;
}
/// Told to the assembler, because compilers make two loads of 8 bytes of one where that suits them.
DPCOMM_DEVICE Vec16 load16(const void* place) {
  Vec16 v;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3])
               : "l"(place)
               : "memory");
  return v;
}
DPCOMM_DEVICE void store16(void* place, Vec16 v) { *static_cast<Vec16*>(global(place)) = v; }
/// One element at any place that its type allows.
template <class T>
DPCOMM_DEVICE T load_one(const void* place) {
  return *static_cast<const T*>(global(place));
}
template <class T>
DPCOMM_DEVICE void store_one(void* place, T value) {
  *static_cast<T*>(global(place)) = value;
}

// --- rounding to nearest even; NaN becomes some NaN
// ------------------------------------------------
/// fp16 bits of low in the low half, of high in the high half.
DPCOMM_DEVICE uint32_t fp16x2_of(float low, float high) {
#if __CUDA_ARCH__ >= 800
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
#else
  uint16_t halves[2];
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(halves[0]) : "f"(low));
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(halves[1]) : "f"(high));
  return halves[0] | (uint32_t{halves[1]} << 16);
#endif
}
DPCOMM_DEVICE float float_of_fp16_bits(uint16_t half) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half));
  return value;
}

// --- warps and blocks: every thread of the warp, or of the block, takes part
// ------------------------
/// The maximum over the 2^k lanes that agree with this one in all but the k low bits of their
/// number.
template <int lanes>
DPCOMM_DEVICE uint32_t max_over(uint32_t value) {
#if __CUDA_ARCH__ >= 800
  if constexpr (lanes == 32) {
    return __reduce_max_sync(0xffffffffu, value);
  } else
#endif
  {
#pragma unroll
    for (int distance = lanes / 2; distance > 0; distance /= 2) {
      const uint32_t other = __shfl_xor_sync(0xffffffffu, value, distance);
      value = other > value ? other : value;
    }
    return value;
  }
}
/// True on all lanes of a warp if it is true on any.
DPCOMM_DEVICE bool any_in_warp(bool value) { return __any_sync(0xffffffffu, value) != 0; }
DPCOMM_DEVICE void warp_sync() { __syncwarp(); }
DPCOMM_DEVICE void block_sync() { __syncthreads(); }
/// `value`. What follows from it, and what lies in shared memory, is worked out and read anew from
/// here on, so that fewer registers are busy.
DPCOMM_DEVICE uint32_t anew(uint32_t value) {
  asm volatile("" : "+r"(value) : : "memory");
  return value;
}
/// In a loop that polls.
DPCOMM_DEVICE void pause() { __nanosleep(32); }

}  // namespace dpcomm::gpu
#endif
