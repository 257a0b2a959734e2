// The vector trait of 8 floats: AVX2 and F16C. See vector_scalar.h for what the functions mean.
#pragma once

#include <immintrin.h>

#include "wire/bits.h"

namespace dpcomm {
namespace {

struct Avx2 {
  static constexpr size_t kWidth = 8;
  using Reg = __m256;

  static Reg load(const void* p) { return _mm256_loadu_ps(static_cast<const float*>(p)); }
  static void store(void* p, Reg x) { _mm256_storeu_ps(static_cast<float*>(p), x); }
  /// Past the caches; to a multiple of the register\'s bytes.
  static void stream(void* p, Reg x) { _mm256_stream_ps(static_cast<float*>(p), x); }

  static Reg load_fp16(const void* p) { return _mm256_cvtph_ps(halves(p)); }
  static void store_fp16(void* p, Reg x) {
    _mm_storeu_si128(static_cast<__m128i*>(p),
                     _mm256_cvtps_ph(canonical(x), _MM_FROUND_TO_NEAREST_INT));
  }

  static Reg load_bf16(const void* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves(p)), 16));
  }
  static void store_bf16(void* p, Reg x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, half), 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    const __m256i chosen = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(kNanBf16), nan);
    const __m256i packed = _mm256_packus_epi32(chosen, chosen);
    _mm_storeu_si128(static_cast<__m128i*>(p),
                     _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
  }

  static Reg all(float x) { return _mm256_set1_ps(x); }
  static Reg add(Reg a, Reg b) { return _mm256_add_ps(a, b); }
  static Reg mul(Reg a, Reg b) { return _mm256_mul_ps(a, b); }
  static Reg div(Reg a, Reg b) { return _mm256_div_ps(a, b); }
  static Reg canonical(Reg x) {
    const Reg nan = _mm256_castsi256_ps(_mm256_set1_epi32(kNan32));
    return _mm256_blendv_ps(x, nan, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  }

 private:
  static __m128i halves(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
};

}  // namespace
}  // namespace dpcomm
