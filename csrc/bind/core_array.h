// A view of what Python calls an array. On the CPU: the buffer protocol (NumPy, array, memoryview,
// bytearray), NumPy arrays of bfloat16, or DLPack (torch, JAX, ...). On a CUDA device: DLPack, or
// __cuda_array_interface__ (CuPy, Numba, RMM, ...).
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <optional>
#include <string>

#include "base/dtype.h"

namespace dpcomm {

/// Where the memory of an array lies.
struct ArrayPlace {
  bool on_device = false;
  int device = -1;  ///< ordinal of the CUDA device; -1: the array does not tell
};

/// "the CPU", "CUDA device 1" or "a CUDA device".
std::string describe(const ArrayPlace& place);

/// Holds the memory while it lives; made and destroyed with the GIL held.
class ArrayView {
 public:
  /// `stream` is the cudaStream_t, as a number, on which an array on a device will be used (0: the
  /// legacy default stream): its library orders the array's contents before what that stream gets
  /// from now on. An array that has no DLPack is taken to be ready for that stream.
  ///
  /// Throws UsageError for an object that is no array, is not contiguous, has a dtype that dpcomm
  /// does not know, lies on a device that is neither the CPU nor CUDA's, or is read-only while
  /// `writable` is asked for; and what the array's own library throws.
  explicit ArrayView(pybind11::handle array, bool writable, uintptr_t stream = 0);
  ~ArrayView();
  ArrayView(const ArrayView&) = delete;
  ArrayView& operator=(const ArrayView&) = delete;

  void* data() const { return data_; }
  size_t count() const { return count_; }
  Dtype dtype() const { return dtype_; }
  const ArrayPlace& place() const { return place_; }

 private:
  bool from_buffer(pybind11::handle array, bool writable);
  bool from_numpy_bfloat16(pybind11::handle array, bool writable);
  bool from_dlpack(pybind11::handle array, bool writable, uintptr_t stream);
  bool from_cuda_array_interface(pybind11::handle array, bool writable);
  void release();

  void* data_ = nullptr;
  size_t count_ = 0;
  Dtype dtype_ = Dtype::kFloat32;
  ArrayPlace place_;
  Py_buffer buffer_{};
  bool has_buffer_ = false;
  pybind11::object keeper_;
  void* managed_ = nullptr;            // DLManagedTensor
  void* managed_versioned_ = nullptr;  // DLManagedTensorVersioned
};

/// The integer type of `bytes` bytes; throws UsageError "dtype `what` is not supported".
Dtype integer_dtype(size_t bytes, bool is_signed, const std::string& what);

[[noreturn]] void refuse_read_only();
[[noreturn]] void refuse_strides();

}  // namespace dpcomm
