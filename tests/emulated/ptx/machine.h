// One CUDA thread that runs a translated kernel: its memory, barriers and warp functions, over the
// emulator (../runtime/device.h). A Machine is a local variable of the translated function.
//
// Which access is what: weak accesses to global memory are data; strong ones are flags (8 bytes),
// words of host memory (4 bytes) or packets (16 bytes), as in csrc/cuda/platform.cuh. Reads of a
// rank's own tables look like data in PTX; they keep the effect of a fence (a release comes after
// them anyway), other accesses take it back.
#pragma once

#include <string>

#include "arithmetic.h"
#include "device.h"

namespace ptx {

enum class Shuffle { kUp, kDown, kBfly, kIdx };

/// Addresses of the host.
struct Span {
  uint64_t begin = 0;
  uint64_t size = 0;
  bool holds(uint64_t address, uint32_t bytes) const {
    return bytes <= size && address - begin <= size - bytes;
  }
};

template <class T>
Span span_of(const T& object) {
  return {reinterpret_cast<uint64_t>(&object), sizeof object};
}

class Machine {
 public:
  /// `key` names the kernel's shared memory in the block; `variables` are the module's.
  Machine(const void* parameters, size_t parameter_bytes, const void* key, size_t shared_bytes,
          Span variables, Span local)
      : place(*dpcomm::emulated::self),
        parameters(reinterpret_cast<uint64_t>(parameters)),
        shared(shared_bytes ? reinterpret_cast<uint64_t>(
                                  dpcomm::emulated::shared_memory(key, shared_bytes, 128))
                            : 0),
        local(local.begin),
        parameter_span_{this->parameters, parameter_bytes},
        shared_span_{shared, shared_bytes},
        variable_span_(variables),
        local_span_(local) {}

  const dpcomm::emulated::Thread& place;
  const uint64_t parameters;  ///< addresses
  const uint64_t shared;
  const uint64_t local;

  uint32_t lane() const { return place.thread & 31; }
  [[noreturn]] __attribute__((cold, noinline)) void fail(int line, const char* problem) const {
    const std::string text = "line " + std::to_string(line) + " of the PTX: " + problem;
    dpcomm::emulated::fail(text.c_str());
  }

  // --- data: begin() for the whole access, then load() or store() for its parts ------------------
  /// An access to memory that only the block or thread itself sees.
  PTX_INLINE void begin_private(uint64_t address, uint32_t bytes, int line) const {
    if (address & (bytes - 1)) fail(line, "misaligned access");
  }
  PTX_INLINE void begin_shared(uint64_t address, uint32_t bytes, int line) const {
    if (address & (bytes - 1)) fail(line, "misaligned access");
    if (!shared_span_.holds(address, bytes)) fail(line, "outside of the block's shared memory");
  }
  __attribute__((noinline)) void begin_global(uint64_t address, uint32_t bytes, bool write,
                                              int line) const {
    if (address & (bytes - 1)) fail(line, "misaligned access");
    if (variable_span_.holds(address, bytes)) return;
    if (dpcomm::emulated::check_data(reinterpret_cast<void*>(address), bytes, write)) {
      dpcomm::emulated::self->fenced = false;
      if (--dpcomm::emulated::self->budget < 0) dpcomm::emulated::yield();
    }
  }
  __attribute__((noinline)) void begin_generic(uint64_t address, uint32_t bytes, bool write,
                                               int line) const {
    if (shared_span_.holds(address, bytes) || parameter_span_.holds(address, bytes) ||
        local_span_.holds(address, bytes)) {
      begin_private(address, bytes, line);
    } else {
      begin_global(address, bytes, write, line);
    }
  }
  template <class T>
  PTX_INLINE T load(uint64_t address) const {
    return *at<T>(address);
  }
  template <class T>
  PTX_INLINE void store(uint64_t address, T value) const {
    *at<T>(address) = value;
  }

  // --- flags, words, packets ---------------------------------------------------------------------
  __attribute__((noinline)) uint64_t load_flag(uint64_t address, bool acquire, int line) {
    poll(address, 8, line);
    return dpcomm::emulated::load_flag(at<uint64_t>(address), acquire);
  }
  __attribute__((noinline)) void store_flag(uint64_t address, uint64_t value, bool release,
                                            int line) {
    begin_private(address, 8, line);
    dpcomm::emulated::store_flag(at<uint64_t>(address), value, release);
  }
  __attribute__((noinline)) uint32_t load_word(uint64_t address, int line) {
    poll(address, 4, line);
    return dpcomm::emulated::load_word(at<uint32_t>(address));
  }
  __attribute__((noinline)) void store_word(uint64_t address, uint32_t value, int line) {
    begin_private(address, 4, line);
    dpcomm::emulated::store_word(at<uint32_t>(address), value);
  }
  __attribute__((noinline)) u128 load_packet(uint64_t address, int line) {
    poll(address, 16, line);
    const auto packet = dpcomm::emulated::load_packet(at<char>(address));
    return u128{packet.high} << 64 | packet.low;
  }
  __attribute__((noinline)) void store_packet(uint64_t address, u128 value, int line) {
    begin_private(address, 16, line);
    dpcomm::emulated::store_packet(
        at<char>(address), {static_cast<uint64_t>(value), static_cast<uint64_t>(value >> 64)});
  }
  /// Of scope .gpu or .sys. One of .cta orders nothing that barriers do not order here anyway.
  PTX_INLINE void fence() const { dpcomm::emulated::fence(); }

  // --- meetings ----------------------------------------------------------------------------------
  void block_sync() const { dpcomm::emulated::block_barrier(); }
  void warp_sync(uint32_t members, int line) const {
    whole_warp(members, line);
    dpcomm::emulated::warp_barrier();
  }
  void pause() {
    last_poll_ = 0;
    dpcomm::emulated::pause();
  }
  uint32_t shuffle(Shuffle mode, uint32_t value, uint32_t b, uint32_t c, uint32_t members,
                   bool& valid, int line) const {
    whole_warp(members, line);
    const uint32_t* all = dpcomm::emulated::warp_exchange(value);
    const int own = static_cast<int>(lane());
    const int segment = static_cast<int>(c >> 8 & 31), clamp = static_cast<int>(c & 31);
    const int distance = static_cast<int>(b & 31);
    const int last = (own & segment) | (clamp & ~segment & 31), first = own & segment;
    int from = own;
    switch (mode) {
      case Shuffle::kUp:
        from = own - distance;
        break;
      case Shuffle::kDown:
        from = own + distance;
        break;
      case Shuffle::kBfly:
        from = own ^ distance;
        break;
      case Shuffle::kIdx:
        from = first | (distance & ~segment & 31);
        break;
    }
    valid = mode == Shuffle::kUp ? from >= last : from <= last;
    return all[valid ? from : own];
  }
  /// Bit i: the predicate of lane i.
  uint32_t ballot(bool mine, uint32_t members, int line) const {
    whole_warp(members, line);
    const uint32_t* all = dpcomm::emulated::warp_exchange(mine);
    uint32_t bits = 0;
    for (int i = 0; i < 32; ++i) bits |= all[i] << i;
    return bits;
  }
  template <class T, class Combine>
  T reduce(T mine, uint32_t members, int line, Combine combine) const {
    whole_warp(members, line);
    const uint32_t* all = dpcomm::emulated::warp_exchange(static_cast<uint32_t>(mine));
    T result = static_cast<T>(all[0]);
    for (int i = 1; i < 32; ++i) result = combine(result, static_cast<T>(all[i]));
    return result;
  }

 private:
  template <class T>
  static T* at(uint64_t address) {
    return reinterpret_cast<T*>(address);  // compiled with -fno-strict-aliasing
  }
  /// The same strong load twice with no pause in between is a loop that waits.
  PTX_INLINE void poll(uint64_t address, uint32_t bytes, int line) {
    begin_private(address, bytes, line);
    if (last_poll_ == line) dpcomm::emulated::pause();
    last_poll_ = line;
  }
  void whole_warp(uint32_t members, int line) const {
    if (members != 0xffffffffu) fail(line, "a warp function without all lanes");
  }

  const Span parameter_span_, shared_span_, variable_span_, local_span_;
  int last_poll_ = 0;
};

/// A translated kernel; run() is the body of one thread.
struct Kernel {
  const char* name;
  void (*run)(const void* parameters);
  size_t parameter_bytes;
};

}  // namespace ptx
