// A view of what Python calls an array: the buffer protocol (NumPy, array, memoryview, bytearray),
// NumPy arrays of bfloat16, or DLPack (torch, JAX, ...), on the CPU.
#pragma once

#include <pybind11/pybind11.h>

#include "base/dtype.h"

namespace dpcomm {

/// Holds the memory while it lives; made and destroyed with the GIL held.
class ArrayView {
 public:
  /// Throws UsageError for an object that is no array, is not contiguous, has a dtype that dpcomm
  /// does not know, lies on another device, or is read-only while `writable` is asked for.
  ArrayView(pybind11::handle array, bool writable);
  ~ArrayView();
  ArrayView(const ArrayView&) = delete;
  ArrayView& operator=(const ArrayView&) = delete;

  void* data() const { return data_; }
  size_t count() const { return count_; }
  Dtype dtype() const { return dtype_; }

 private:
  bool from_buffer(pybind11::handle array, bool writable);
  bool from_numpy_bfloat16(pybind11::handle array, bool writable);
  bool from_dlpack(pybind11::handle array);
  void release();

  void* data_ = nullptr;
  size_t count_ = 0;
  Dtype dtype_ = Dtype::kFloat32;
  Py_buffer buffer_{};
  bool has_buffer_ = false;
  pybind11::object keeper_;
  void* managed_ = nullptr;  // DLManagedTensor
};

}  // namespace dpcomm
