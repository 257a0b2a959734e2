// The two kinds of array that most calls bring, seen without a Python call: NumPy's and torch's
// own, on the CPU. Everything else is for ArrayView.
#pragma once

#include <Python.h>

#include <cstddef>

#include "base/dtype.h"

namespace dpcomm {

/// An array that somebody else holds.
struct PlainArray {
  void* data = nullptr;
  size_t count = 0;
  Dtype dtype = Dtype::kFloat32;
  bool writable = false;
};

/// True if `object` is exactly a numpy.ndarray or a torch.Tensor (no subclass), C-contiguous, on
/// the CPU, of a dtype that dpcomm knows in this machine's order, and asks for no gradient: then
/// `array` is what an ArrayView would say of it. False leaves `array` undefined and no Python error
/// behind. With the GIL; imports nothing; costs some nanoseconds (of a tensor, some tens).
bool see_plain_array(PyObject* object, PlainArray& array);

}  // namespace dpcomm
