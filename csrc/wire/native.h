// The native wire format, and tensors in memory: elements one after the other, exact.
//
// FloatTensor serves fp32, fp16 and bf16, which accumulate in fp32; ExactTensor the dtypes that
// accumulate in their own type.
#pragma once

#include "wire/arithmetic.h"
#include "wire/codec.h"
#include "wire/vector_scalar.h"

namespace dpcomm {
namespace {

/// How a floating dtype of 32 bits and fewer lies in memory.
struct Float32 {
  static constexpr size_t kBytes = 4;
  template <class V>
  static typename V::Reg load(const void* p) {
    return V::load(p);
  }
  template <class V>
  static void store(void* p, typename V::Reg x) {
    V::store(p, V::canonical(x));
  }
};
struct Float16 {
  static constexpr size_t kBytes = 2;
  template <class V>
  static typename V::Reg load(const void* p) {
    return V::load_fp16(p);
  }
  template <class V>
  static void store(void* p, typename V::Reg x) {
    V::store_fp16(p, x);
  }
};
struct BFloat16 {
  static constexpr size_t kBytes = 2;
  template <class V>
  static typename V::Reg load(const void* p) {
    return V::load_bf16(p);
  }
  template <class V>
  static void store(void* p, typename V::Reg x) {
    V::store_bf16(p, x);
  }
};

template <class V, class Element>
struct FloatTensor {
  static constexpr size_t kBytes = Element::kBytes;

  static size_t slice_bytes(size_t total) { return total * kBytes; }

  static void load(void* acc, const void* base, size_t, size_t first, size_t n) {
    float* to = static_cast<float*>(acc);
    const char* from = static_cast<const char*>(base) + first * kBytes;
    for_vectors<V>(n, [=](auto v, size_t i) {
      using W = decltype(v);
      W::store(to + i, Element::template load<W>(from + i * kBytes));
    });
  }

  static void sum(void* acc, const void* base, size_t, size_t first, size_t n) {
    float* to = static_cast<float*>(acc);
    const char* from = static_cast<const char*>(base) + first * kBytes;
    for_vectors<V>(n, [=](auto v, size_t i) {
      using W = decltype(v);
      W::store(to + i, W::add(W::load(to + i), Element::template load<W>(from + i * kBytes)));
    });
  }

  template <ReduceOp op>
  static void combine(void* acc, const void* base, size_t total, size_t first, size_t n) {
    constexpr size_t kTile = 256;
    float decoded[kTile];
    float* to = static_cast<float*>(acc);
    for (size_t done = 0; done < n; done += kTile) {
      const size_t count = n - done < kTile ? n - done : kTile;
      load(decoded, base, total, first + done, count);
      for (size_t i = 0; i < count; ++i) to[done + i] = combined<op>(to[done + i], decoded[i]);
    }
  }

  static void store(void* base, size_t, size_t first, void* acc, size_t n, bool keep) {
    char* to = static_cast<char*>(base) + first * kBytes;
    float* from = static_cast<float*>(acc);
    if (keep) {
      for_vectors<V>(n, [=](auto v, size_t i) {
        using W = decltype(v);
        Element::template store<W>(to + i * kBytes, W::load(from + i));
        W::store(from + i, Element::template load<W>(to + i * kBytes));
      });
    } else {
      for_vectors<V>(n, [=](auto v, size_t i) {
        using W = decltype(v);
        Element::template store<W>(to + i * kBytes, W::load(from + i));
      });
    }
  }

  static void premultiply(void* acc, double factor, size_t n) {
    float* values = static_cast<float*>(acc);
    const float by = static_cast<float>(factor);
    for_vectors<V>(n, [=](auto v, size_t i) {
      using W = decltype(v);
      char rounded[W::kWidth * kBytes];
      Element::template store<W>(rounded, W::mul(W::load(values + i), W::all(by)));
      W::store(values + i, Element::template load<W>(rounded));
    });
  }

  static void divide(void* acc, int64_t divisor, size_t n) {
    float* values = static_cast<float*>(acc);
    const float by = static_cast<float>(divisor);
    for_vectors<V>(n, [=](auto v, size_t i) {
      using W = decltype(v);
      W::store(values + i, W::div(W::load(values + i), W::all(by)));
    });
  }

  static constexpr Codec codec() {
    Codec codec{slice_bytes, load, {}, store};
    codec.combine[static_cast<int>(ReduceOp::kSum)] = sum;
    codec.combine[static_cast<int>(ReduceOp::kProduct)] = combine<ReduceOp::kProduct>;
    codec.combine[static_cast<int>(ReduceOp::kMin)] = combine<ReduceOp::kMin>;
    codec.combine[static_cast<int>(ReduceOp::kMax)] = combine<ReduceOp::kMax>;
    return codec;
  }

  /// As a lossy wire format, which combines by SUM only.
  static constexpr Codec wire() {
    Codec codec{slice_bytes, load, {}, store};
    codec.combine[static_cast<int>(ReduceOp::kSum)] = sum;
    return codec;
  }

  static constexpr AccumulatorOps ops() { return {premultiply, divide}; }
};

/// float64, the integers and bool (T is Bool).
template <class T>
struct ExactTensor {
  static size_t slice_bytes(size_t total) { return total * sizeof(T); }

  static void load(void* acc, const void* base, size_t, size_t first, size_t n) {
    T* to = static_cast<T*>(acc);
    const char* from = static_cast<const char*>(base) + first * sizeof(T);
    for (size_t i = 0; i < n; ++i) to[i] = as_loaded(load_as<T>(from + i * sizeof(T)));
  }

  template <ReduceOp op>
  static void combine(void* acc, const void* base, size_t, size_t first, size_t n) {
    T* to = static_cast<T*>(acc);
    const char* from = static_cast<const char*>(base) + first * sizeof(T);
    for (size_t i = 0; i < n; ++i) to[i] = combined<op>(to[i], load_as<T>(from + i * sizeof(T)));
  }

  static void store(void* base, size_t, size_t first, void* acc, size_t n, bool keep) {
    char* to = static_cast<char*>(base) + first * sizeof(T);
    T* from = static_cast<T*>(acc);
    for (size_t i = 0; i < n; ++i) store_as(to + i * sizeof(T), as_stored(from[i]));
    if (keep) {
      for (size_t i = 0; i < n; ++i) from[i] = as_stored(from[i]);
    }
  }

  static void premultiply(void* acc, double factor, size_t n) {
    T* values = static_cast<T*>(acc);
    for (size_t i = 0; i < n; ++i) values[i] = as_stored(values[i] * factor);
  }

  static void divide(void* acc, int64_t divisor, size_t n) {
    T* values = static_cast<T*>(acc);
    for (size_t i = 0; i < n; ++i) values[i] = quotient(values[i], divisor);
  }

  /// float64 has both, the integers divide, bool has neither.
  static constexpr AccumulatorOps ops() {
    if constexpr (kIsFloat64<T>) {
      return {premultiply, divide};
    } else if constexpr (kIsBool<T>) {
      return {nullptr, nullptr};
    } else {
      return {nullptr, divide};
    }
  }

  static constexpr Codec codec() {
    Codec codec{slice_bytes, load, {}, store};
    codec.combine[static_cast<int>(ReduceOp::kSum)] = combine<ReduceOp::kSum>;
    codec.combine[static_cast<int>(ReduceOp::kProduct)] = combine<ReduceOp::kProduct>;
    codec.combine[static_cast<int>(ReduceOp::kMin)] = combine<ReduceOp::kMin>;
    codec.combine[static_cast<int>(ReduceOp::kMax)] = combine<ReduceOp::kMax>;
    if constexpr (!kIsFloat64<T>) {
      codec.combine[static_cast<int>(ReduceOp::kBand)] = combine<ReduceOp::kBand>;
      codec.combine[static_cast<int>(ReduceOp::kBor)] = combine<ReduceOp::kBor>;
      codec.combine[static_cast<int>(ReduceOp::kBxor)] = combine<ReduceOp::kBxor>;
    }
    return codec;
  }
};

}  // namespace
}  // namespace dpcomm
