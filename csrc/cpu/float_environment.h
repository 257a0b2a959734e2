// The floating-point state that law 13 wants: round to nearest, denormals kept.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace dpcomm {

/// While it lives, this thread rounds to nearest even and keeps denormals; then the caller's own
/// state is back (a caller may flush denormals, as torch.set_flush_denormal does).
class FloatEnvironment {
 public:
  FloatEnvironment(const FloatEnvironment&) = delete;
  FloatEnvironment& operator=(const FloatEnvironment&) = delete;
#if defined(__x86_64__)
  FloatEnvironment() : saved_(_mm_getcsr()) {
    if (saved_ != kDefault) _mm_setcsr(kDefault);
  }
  ~FloatEnvironment() { _mm_setcsr(saved_); }

 private:
  static constexpr unsigned kDefault = 0x1f80;  // all exceptions masked, nearest even, no flushing
  unsigned saved_;
#elif defined(__aarch64__)
  FloatEnvironment() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" : : "r"(0ul));
  }
  ~FloatEnvironment() { asm volatile("msr fpcr, %0" : : "r"(saved_)); }

 private:
  unsigned long saved_;
#else
  FloatEnvironment() {}
  ~FloatEnvironment() {}
#endif
};

}  // namespace dpcomm
