// The bf16 wire format: each element rounded to bf16, to nearest even; fp32's range, no header.
// A finite magnitude of (1 - 2^-9) * 2^128 and above rounds to Inf, as a cast to bf16 does.
#pragma once

#include "wire/native.h"

namespace dpcomm {
namespace {

template <class V>
using Bf16Wire = FloatTensor<V, BFloat16>;

}  // namespace
}  // namespace dpcomm
