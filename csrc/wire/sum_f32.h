// The sum of several fp32 arrays in one pass over memory (wire/codec.h, SumF32).
#pragma once

#include "wire/codec.h"
#include "wire/vector_scalar.h"

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

template <class V>
void sum_f32_by(float* const* dst, int destinations, const float* const* src, int sources,
                int64_t divisor, size_t n) {
  if (divisor == 1) {
    sum_by_sources<V, false>(dst, destinations, src, sources, 1.0f, n);
  } else {
    sum_by_sources<V, true>(dst, destinations, src, sources, static_cast<float>(divisor), n);
  }
}

}  // namespace
}  // namespace dpcomm
