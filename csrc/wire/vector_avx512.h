// The vector trait of 16 floats: AVX-512. See vector_scalar.h for what the functions mean.
#pragma once

#include <immintrin.h>

#include "wire/bits.h"

namespace dpcomm {
namespace {

struct Avx512 {
  static constexpr size_t kWidth = 16;
  using Reg = __m512;

  static Reg load(const void* p) { return _mm512_loadu_ps(p); }
  static void store(void* p, Reg x) { _mm512_storeu_ps(p, x); }
  /// Past the caches; to a multiple of the register\'s bytes.
  static void stream(void* p, Reg x) { _mm512_stream_ps(static_cast<float*>(p), x); }

  static Reg load_fp16(const void* p) { return _mm512_cvtph_ps(halves(p)); }
  static void store_fp16(void* p, Reg x) {
    _mm256_storeu_si256(static_cast<__m256i*>(p),
                        _mm512_cvtps_ph(canonical(x), _MM_FROUND_TO_NEAREST_INT));
  }

  static Reg load_bf16(const void* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves(p)), 16));
  }
  static void store_bf16(void* p, Reg x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, half), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    const __m512i chosen = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(kNanBf16));
    _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtepi32_epi16(chosen));
  }

  static Reg all(float x) { return _mm512_set1_ps(x); }
  static Reg add(Reg a, Reg b) { return _mm512_add_ps(a, b); }
  static Reg mul(Reg a, Reg b) { return _mm512_mul_ps(a, b); }
  static Reg div(Reg a, Reg b) { return _mm512_div_ps(a, b); }
  static Reg canonical(Reg x) {
    const Reg nan = _mm512_castsi512_ps(_mm512_set1_epi32(kNan32));
    return _mm512_mask_mov_ps(x, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), nan);
  }

 private:
  static __m256i halves(const void* p) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(p));
  }
};

}  // namespace
}  // namespace dpcomm
