// The host twin of csrc/cuda/platform.cuh: the same names, over the emulator. See there for what
// they mean.
#pragma once

#include <cstdint>
#include <cstring>

#include "device.h"

#define DPCOMM_DEVICE inline
#define DPCOMM_SHARED(Type, name)   \
  static const char name##_key = 0; \
  Type& name = *static_cast<Type*>( \
      dpcomm::emulated::shared_memory(&name##_key, sizeof(Type), alignof(Type)))

namespace dpcomm::gpu {

inline constexpr bool kSharedIsScarce = false;

struct alignas(16) Vec16 {
  uint32_t w[4];
};

inline uint32_t thread() { return emulated::self->thread; }
inline uint32_t threads() { return emulated::self->threads; }
inline uint32_t block_x() { return emulated::self->block_x; }
inline uint32_t block_y() { return emulated::self->block_y; }

inline uint64_t load_flag_relaxed(const uint64_t* flag) { return emulated::load_flag(flag, false); }
inline uint64_t load_flag_acquire(const uint64_t* flag) { return emulated::load_flag(flag, true); }
inline void store_flag_relaxed(uint64_t* flag, uint64_t value) {
  emulated::store_flag(flag, value, false);
}
inline void fence_system() { emulated::fence(); }

inline uint32_t load_word_relaxed(const uint32_t* word) { return emulated::load_word(word); }
inline void store_word_relaxed(uint32_t* word, uint32_t value) {
  emulated::store_word(word, value);
}

inline Vec16 load_packet(const void* place) {
  const emulated::Packet packet = emulated::load_packet(place);
  Vec16 v;
  std::memcpy(&v, &packet, sizeof v);
  return v;
}
inline void store_packet(void* place, Vec16 v) {
  emulated::Packet packet;
  std::memcpy(&packet, &v, sizeof v);
  emulated::store_packet(place, packet);
}

inline Vec16 load16(const void* place) { return emulated::load_data<Vec16>(place); }
inline void store16(void* place, Vec16 v) { emulated::store_data(place, v); }
template <class T>
T load_one(const void* place) {
  return emulated::load_data<T>(place);
}
template <class T>
void store_one(void* place, T value) {
  emulated::store_data(place, value);
}

/// fp16 bits of a float, to nearest even. Scaled so that the addition of a power of two rounds at
/// fp16's last place.
inline uint32_t fp16_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t sign = bits >> 16 & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7fff;          // NaN, as the device makes it
  if (magnitude >= 0x477ff000u) return sign | 0x7c00;  // from 65520: Inf
  if (magnitude >= 0x38800000u) {                      // normal in fp16
    return sign | ((magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1)) >> 13);
  }
  float small;
  std::memcpy(&small, &magnitude, sizeof small);
  small += 0.5f;  // the unit in the last place of 0.5 is 2^-24, fp16's smallest number
  std::memcpy(&bits, &small, sizeof bits);
  return sign | (bits - 0x3f000000u);
}
inline uint32_t fp16x2_of(float low, float high) { return fp16_of(low) | fp16_of(high) << 16; }
inline float float_of_fp16_bits(uint16_t half) {
  const uint32_t sign = uint32_t{half} << 16 & 0x80000000u;
  const uint32_t magnitude = half & 0x7fffu;
  uint32_t bits;
  if (magnitude > 0x7c00) {
    bits = 0x7fffffff;
  } else if (magnitude == 0x7c00) {
    bits = sign | 0x7f800000u;
  } else if (magnitude >= 0x400) {
    bits = sign | ((magnitude << 13) + 0x38000000u);
  } else {
    const float value = static_cast<float>(magnitude) / 16777216.0f;
    std::memcpy(&bits, &value, sizeof bits);
    bits |= sign;
  }
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <int lanes>
uint32_t max_over(uint32_t value) {
  const uint32_t* given = emulated::warp_exchange(value);
  const uint32_t first = emulated::self->thread % 32 / lanes * lanes;
  for (int i = 0; i < lanes; ++i) value = given[first + i] > value ? given[first + i] : value;
  return value;
}
inline bool any_in_warp(bool value) {
  const uint32_t* given = emulated::warp_exchange(value ? 1 : 0);
  for (int i = 0; i < 32; ++i) value = value || given[i] != 0;
  return value;
}
inline uint32_t anew(uint32_t value) { return value; }
inline void warp_sync() { emulated::warp_barrier(); }
inline void block_sync() { emulated::block_barrier(); }
inline void pause() { emulated::pause(); }

}  // namespace dpcomm::gpu
