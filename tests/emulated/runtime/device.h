// What code on an emulated device calls: the host twin of csrc/cuda/platform.cuh and the C++ that
// is made from PTX are both written in terms of this. Everything here is called from a fiber of a
// World (emulator.h), which is one CUDA thread.
//
// Under ThreadSanitizer a fiber is a thread. It knows no fences, so a relaxed store of a flag
// counts as a release if the thread fenced before and has touched no data and met no barrier since.
// Block barriers and warp barriers order memory; shuffles and votes do not.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

namespace dpcomm::emulated {

/// The part of a thread that the functions below touch.
struct Thread {
  uint32_t thread = 0, threads = 1;
  uint32_t block_x = 0, block_y = 0;
  uint32_t blocks_x = 1, blocks_y = 1;
  bool fenced = false;
  int32_t budget = 0;  ///< accesses to data before others get a turn
};

/// The running thread; null outside of fibers.
extern constinit thread_local Thread* self;

// --- told to the scheduler (emulator.cc)
// -----------------------------------------------------------
/// An access to data of `size` bytes: in one region, aligned to its size; counted. Returns false
/// for memory that only its rank uses (MemoryClass::kState).
bool check_data(const void* place, uint32_t size, bool write);
enum class FlagAccess : uint8_t { kPoll, kAcquire, kStore, kPacketPoll, kPacketStore, kWord };
/// An access to a flag, packet or word; `value` is what is stored. Others may get a turn here.
void before_flag(const void* place, uint32_t size, FlagAccess access, uint64_t value);
/// What a load of a flag, packet or word gave: for reports, and to know that a block saw an abort.
void after_flag(const void* place, FlagAccess access, uint64_t value);
/// Lets others run; the thread stays ready.
void yield();
/// Yields after a poll that found nothing.
void pause();
void count_fence();
void block_barrier();
void warp_barrier();
/// The values that the 32 lanes of the warp gave, by lane; valid until the next but one exchange.
const uint32_t* warp_exchange(uint32_t value);
/// The block's shared memory that is known by `key`; filled with 0xa5 at the block's start.
void* shared_memory(const void* key, size_t bytes, size_t alignment);
/// Ends the run with an error that names the thread.
[[noreturn]] void fail(const char* text);

// --- data
// ------------------------------------------------------------------------------------------
inline void note_data(const void* place, uint32_t size, bool write) {
  self->fenced = false;
  check_data(place, size, write);
  if (--self->budget < 0) yield();
}

template <class T>
T load_data(const void* place) {
  note_data(place, sizeof(T), false);
  return *static_cast<const T*>(place);
}
template <class T>
void store_data(void* place, T value) {
  note_data(place, sizeof(T), true);
  *static_cast<T*>(place) = value;
}

// --- flags
// -----------------------------------------------------------------------------------------
template <class T>
T load_flag(const T* flag, bool acquire) {
  const FlagAccess access = acquire ? FlagAccess::kAcquire : FlagAccess::kPoll;
  before_flag(flag, sizeof(T), access, 0);
  const T value =
      acquire ? __atomic_load_n(flag, __ATOMIC_ACQUIRE) : __atomic_load_n(flag, __ATOMIC_RELAXED);
  after_flag(flag, access, static_cast<uint64_t>(value));
  return value;
}
template <class T>
void store_flag(T* flag, T value, bool release) {
  before_flag(flag, sizeof(T), FlagAccess::kStore, static_cast<uint64_t>(value));
  if (release || self->fenced) {
    __atomic_store_n(flag, value, __ATOMIC_RELEASE);
  } else {
    __atomic_store_n(flag, value, __ATOMIC_RELAXED);
  }
  after_flag(flag, FlagAccess::kStore, static_cast<uint64_t>(value));
}
inline void fence() {
  count_fence();
  self->fenced = true;
}

// --- words of host memory: no order, and no progress
// ------------------------------------------------
inline uint32_t load_word(const uint32_t* word) {
  before_flag(word, sizeof(uint32_t), FlagAccess::kWord, 0);
  const uint32_t value = __atomic_load_n(word, __ATOMIC_RELAXED);
  after_flag(word, FlagAccess::kWord, value);
  return value;
}
inline void store_word(uint32_t* word, uint32_t value) {
  before_flag(word, sizeof(uint32_t), FlagAccess::kWord, value);
  __atomic_store_n(word, value, __ATOMIC_RELAXED);
}

// --- packets: 16 bytes in one access, as two halves
// --------------------------------------------------
struct Packet {
  uint64_t low, high;
};
inline Packet load_packet(const void* place) {
  before_flag(place, sizeof(Packet), FlagAccess::kPacketPoll, 0);
  Packet packet;
#if defined(__x86_64__)
  // In assembler, because ThreadSanitizer would take it for a plain access.
  __m128i both;
  asm volatile("movdqa %1, %0" : "=x"(both) : "m"(*static_cast<const __m128i*>(place)) : "memory");
  std::memcpy(&packet, &both, sizeof packet);
#else
  const uint64_t* halves = static_cast<const uint64_t*>(place);
  packet.high = __atomic_load_n(halves + 1, __ATOMIC_ACQUIRE);
  packet.low = __atomic_load_n(halves, __ATOMIC_RELAXED);
#endif
  after_flag(place, FlagAccess::kPacketPoll, packet.high >> 32);
  return packet;
}
inline void store_packet(void* place, Packet packet) {
  before_flag(place, sizeof(Packet), FlagAccess::kPacketStore, packet.high >> 32);
#if defined(__x86_64__)
  __m128i both;
  std::memcpy(&both, &packet, sizeof packet);
  asm volatile("movdqa %1, %0" : "=m"(*static_cast<__m128i*>(place)) : "x"(both) : "memory");
#else
  uint64_t* halves = static_cast<uint64_t*>(place);
  __atomic_store_n(halves, packet.low, __ATOMIC_RELAXED);
  __atomic_store_n(halves + 1, packet.high, __ATOMIC_RELEASE);
#endif
  after_flag(place, FlagAccess::kPacketStore, packet.high >> 32);
}

}  // namespace dpcomm::emulated
