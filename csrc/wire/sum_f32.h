// The sum of several fp32 arrays in one pass over memory (wire/codec.h, SumF32).
#pragma once

#include "wire/codec.h"
#include "wire/native.h"

namespace dpcomm {
namespace {

/// kSources = 0: their number is known at run time only.
template <class V, int kSources, bool kDivide>
inline void sum_pass(float* const* dst, int destinations, const float* const* src, int sources,
                     float divisor, size_t n) {
  constexpr size_t kVectors = 4;
  const int count = kSources != 0 ? kSources : sources;
  const auto finish = [=](auto v, auto sum) {
    using W = decltype(v);
    if constexpr (kDivide) sum = W::div(sum, W::all(divisor));
    return W::canonical(sum);
  };
  size_t i = 0;
  for (; i + kVectors * V::kWidth <= n; i += kVectors * V::kWidth) {
    typename V::Reg sum[kVectors];
    for (size_t k = 0; k < kVectors; ++k) sum[k] = V::load(src[0] + i + k * V::kWidth);
    for (int s = 1; s < count; ++s) {
      for (size_t k = 0; k < kVectors; ++k) {
        sum[k] = V::add(sum[k], V::load(src[s] + i + k * V::kWidth));
      }
    }
    for (size_t k = 0; k < kVectors; ++k) sum[k] = finish(V{}, sum[k]);
    for (int d = 0; d < destinations; ++d) {
      for (size_t k = 0; k < kVectors; ++k) V::store(dst[d] + i + k * V::kWidth, sum[k]);
    }
  }
  for (; i < n; ++i) {
    float sum = Scalar::load(src[0] + i);
    for (int s = 1; s < count; ++s) sum += Scalar::load(src[s] + i);
    sum = finish(Scalar{}, sum);
    for (int d = 0; d < destinations; ++d) Scalar::store(dst[d] + i, sum);
  }
}

template <class V, bool kDivide>
inline void sum_by_sources(float* const* dst, int destinations, const float* const* src,
                           int sources, float divisor, size_t n) {
  switch (sources) {
    case 2:
      return sum_pass<V, 2, kDivide>(dst, destinations, src, sources, divisor, n);
    case 4:
      return sum_pass<V, 4, kDivide>(dst, destinations, src, sources, divisor, n);
    default:
      return sum_pass<V, 0, kDivide>(dst, destinations, src, sources, divisor, n);
  }
}

/// The same by tiles in L1, through loops that the compiler makes vectors of; for no vector trait.
inline void sum_by_tiles(float* const* dst, int destinations, const float* const* src, int sources,
                         int64_t divisor, size_t n) {
  using Tensor = FloatTensor<Scalar, Float32>;
  constexpr size_t kTile = 1024;
  float acc[kTile];
  for (size_t first = 0; first < n; first += kTile) {
    const size_t count = n - first < kTile ? n - first : kTile;
    Tensor::load(acc, src[0], n, first, count);
    for (int s = 1; s < sources; ++s) Tensor::sum(acc, src[s], n, first, count);
    if (divisor != 1) Tensor::divide(acc, divisor, count);
    for (int d = 0; d < destinations; ++d) Tensor::store(dst[d], n, first, acc, count, false);
  }
}

/// V, whose stores go past the caches.
template <class V>
struct Streaming : V {
  static void store(void* p, typename V::Reg x) { V::stream(p, x); }
};

template <class V>
void sum_f32_by(float* const* dst, int destinations, const float* const* src, int sources,
                int64_t divisor, size_t n) {
  if constexpr (V::kWidth == 1) {
    sum_by_tiles(dst, destinations, src, sources, divisor, n);
  } else if (divisor == 1) {
    sum_by_sources<V, false>(dst, destinations, src, sources, 1.0f, n);
  } else {
    sum_by_sources<V, true>(dst, destinations, src, sources, static_cast<float>(divisor), n);
  }
}

constexpr size_t kStreamAlignment = 64;

inline size_t bytes_to_alignment(const void* p) {
  return (kStreamAlignment - reinterpret_cast<uintptr_t>(p) % kStreamAlignment) % kStreamAlignment;
}

/// Streaming stores want alignment: where destinations lie differently, it is an ordinary sum.
template <class V>
void sum_f32_streaming_by(float* const* dst, int destinations, const float* const* src, int sources,
                          int64_t divisor, size_t n) {
  constexpr int kMost = 64;
  bool possible = V::kWidth > 1 && destinations <= kMost && sources <= kMost;
  const size_t lead = bytes_to_alignment(dst[0]);
  for (int d = 0; d < destinations; ++d) possible = possible && bytes_to_alignment(dst[d]) == lead;
  const size_t head = lead / sizeof(float);
  if (!possible || lead % sizeof(float) != 0 || head >= n) {
    sum_f32_by<V>(dst, destinations, src, sources, divisor, n);
    return;
  }
  if constexpr (V::kWidth > 1) {
    float* to[kMost];
    const float* from[kMost];
    for (int d = 0; d < destinations; ++d) to[d] = dst[d] + head;
    for (int s = 0; s < sources; ++s) from[s] = src[s] + head;
    const float by = static_cast<float>(divisor);
    if (head > 0) sum_f32_by<V>(dst, destinations, src, sources, divisor, head);
    if (divisor == 1) {
      sum_by_sources<Streaming<V>, false>(to, destinations, from, sources, by, n - head);
    } else {
      sum_by_sources<Streaming<V>, true>(to, destinations, from, sources, by, n - head);
    }
    __builtin_ia32_sfence();
  }
}

template <class V>
void copy_streaming_by(void* to, const void* from, size_t bytes) {
  char* out = static_cast<char*>(to);
  const char* in = static_cast<const char*>(from);
  size_t i = 0;
  if constexpr (V::kWidth > 1) {
    constexpr size_t kStep = V::kWidth * sizeof(float);
    const size_t lead = bytes_to_alignment(out);
    if (lead + kStreamAlignment <= bytes) {
      __builtin_memcpy(out, in, lead);
      for (i = lead; i + 4 * kStep <= bytes; i += 4 * kStep) {
        typename V::Reg x[4];
        for (size_t k = 0; k < 4; ++k) x[k] = V::load(in + i + k * kStep);
        for (size_t k = 0; k < 4; ++k) V::stream(out + i + k * kStep, x[k]);
      }
      __builtin_ia32_sfence();
    }
  }
  __builtin_memcpy(out + i, in + i, bytes - i);
}

}  // namespace
}  // namespace dpcomm
