// Copies between tensors of one dtype, whichever it is.
#pragma once

#include <ATen/core/Tensor.h>

namespace dpcomm {

/// Copies the elements of `from` to `to`, of the same shape and dtype and of any strides. Unlike
/// torch's copy_(), which this is otherwise, it takes dtypes that torch only stores.
void copy_elements(const at::Tensor& to, const at::Tensor& from);

}  // namespace dpcomm
