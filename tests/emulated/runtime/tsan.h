// What the scheduler tells ThreadSanitizer. The scheduler itself is compiled without it, and with
// DPCOMM_EMULATED_TSAN where the rest is compiled with it.
#pragma once

#if defined(DPCOMM_EMULATED_TSAN)
extern "C" {
void* __tsan_get_current_fiber(void);
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* place);
void __tsan_release(void* place);
}
#endif

namespace dpcomm::emulated::tsan {

#if defined(DPCOMM_EMULATED_TSAN)
inline constexpr bool kOn = true;
inline void* current() { return __tsan_get_current_fiber(); }
inline void* create() { return __tsan_create_fiber(0); }
inline void destroy(void* fiber) { __tsan_destroy_fiber(fiber); }
/// Orders nothing.
inline void switch_to(void* fiber) { __tsan_switch_to_fiber(fiber, 1); }
inline void acquire(void* place) { __tsan_acquire(place); }
inline void release(void* place) { __tsan_release(place); }
#else
inline constexpr bool kOn = false;
inline void* current() { return nullptr; }
inline void* create() { return nullptr; }
inline void destroy(void*) {}
inline void switch_to(void*) {}
inline void acquire(void*) {}
inline void release(void*) {}
#endif

}  // namespace dpcomm::emulated::tsan
