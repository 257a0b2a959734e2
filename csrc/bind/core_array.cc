#include "bind/core_array.h"

#include <cstdint>
#include <cstring>
#include <string>

#include "base/error.h"

namespace py = pybind11;

namespace dpcomm {
namespace {

// DLPack's C structures (DLPack 1.0, dlpack.h), as far as a consumer on the CPU needs them.
struct DLDevice {
  int32_t device_type;
  int32_t device_id;
};
struct DLDataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};
struct DLTensor {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};
struct DLManagedTensor {
  DLTensor dl_tensor;
  void* manager_ctx;
  void (*deleter)(DLManagedTensor*);
};
constexpr int32_t kDLCPU = 1;
enum DLCode : uint8_t { kDLInt = 0, kDLUInt = 1, kDLFloat = 2, kDLBfloat = 4, kDLBool = 6 };

Dtype integer(size_t bytes, bool is_signed, const std::string& what) {
  if (bytes == 1) return is_signed ? Dtype::kInt8 : Dtype::kUint8;
  if (is_signed && bytes == 2) return Dtype::kInt16;
  if (is_signed && bytes == 4) return Dtype::kInt32;
  if (is_signed && bytes == 8) return Dtype::kInt64;
  throw usage_error("dtype ", what, " is not supported");
}

Dtype from_format(const char* format, size_t bytes) {
  const std::string text = format == nullptr ? "B" : format;
  const char code = text.empty() ? 'B' : text.back();
  // '@', '=' and '<' are this machine's order; anything else before the code ("Zf", "3f", ">f") is
  // another type.
  const bool own_order = text.size() == 2 && std::strchr("@=<", text[0]) != nullptr;
  if (text.size() <= 1 || own_order) {
    switch (code) {
      case '?':
        return Dtype::kBool;
      case 'e':
        return Dtype::kFloat16;
      case 'f':
        return Dtype::kFloat32;
      case 'd':
        return Dtype::kFloat64;
      case 'b':
      case 'h':
      case 'i':
      case 'l':
      case 'q':
        return integer(bytes, true, text);
      case 'B':
      case 'c':
        return integer(bytes, false, text);
      default:
        break;
    }
  }
  throw usage_error("dtype with buffer format '", text, "' is not supported");
}

Dtype from_dl(const DLDataType& type) {
  const std::string what =
      str("with DLPack code ", int(type.code), " of ", int(type.bits), " bits");
  if (type.lanes == 1) {
    if (type.code == kDLBfloat && type.bits == 16) return Dtype::kBFloat16;
    if (type.code == kDLBool && type.bits == 8) return Dtype::kBool;
    if (type.code == kDLInt) return integer(type.bits / 8, true, what);
    if (type.code == kDLUInt) return integer(type.bits / 8, false, what);
    if (type.code == kDLFloat && type.bits == 16) return Dtype::kFloat16;
    if (type.code == kDLFloat && type.bits == 32) return Dtype::kFloat32;
    if (type.code == kDLFloat && type.bits == 64) return Dtype::kFloat64;
  }
  throw usage_error("dtype ", what, " is not supported");
}

bool is_contiguous(const DLTensor& tensor) {
  if (tensor.strides == nullptr) return true;
  for (int i = 0; i < tensor.ndim; ++i) {
    if (tensor.shape[i] == 0) return true;
  }
  int64_t expected = 1;
  for (int i = tensor.ndim - 1; i >= 0; --i) {
    if (tensor.shape[i] != 1 && tensor.strides[i] != expected) return false;
    expected *= tensor.shape[i];
  }
  return true;
}

}  // namespace

ArrayView::ArrayView(py::handle array, bool writable) {
  try {
    if (from_buffer(array, writable)) return;
    if (from_numpy_bfloat16(array, writable)) return;
    if (from_dlpack(array)) return;
    throw usage_error("'", Py_TYPE(array.ptr())->tp_name,
                      "' is not an array: it has neither the buffer protocol nor DLPack");
  } catch (...) {
    release();  // a refused array is not held
    throw;
  }
}

ArrayView::~ArrayView() { release(); }

void ArrayView::release() {
  if (has_buffer_) PyBuffer_Release(&buffer_);
  has_buffer_ = false;
  auto* managed = static_cast<DLManagedTensor*>(managed_);
  if (managed != nullptr && managed->deleter != nullptr) managed->deleter(managed);
  managed_ = nullptr;
}

bool ArrayView::from_buffer(py::handle array, bool writable) {
  if (!PyObject_CheckBuffer(array.ptr())) return false;
  if (PyObject_GetBuffer(array.ptr(), &buffer_, PyBUF_FORMAT | PyBUF_STRIDES) != 0) {
    PyErr_Clear();  // a dtype that the buffer protocol cannot express
    return false;
  }
  has_buffer_ = true;
  if (writable && buffer_.readonly) throw usage_error("the array is read-only");
  if (!PyBuffer_IsContiguous(&buffer_, 'C')) {
    throw usage_error("the array is not C-contiguous; pass a contiguous copy");
  }
  dtype_ = from_format(buffer_.format, buffer_.itemsize);
  data_ = buffer_.buf;
  count_ = buffer_.itemsize > 0 ? buffer_.len / buffer_.itemsize : 0;
  return true;
}

bool ArrayView::from_numpy_bfloat16(py::handle array, bool writable) {
  if (!py::hasattr(array, "__array_interface__") || !py::hasattr(array, "dtype")) return false;
  if (py::str(array.attr("dtype").attr("name")).cast<std::string>() != "bfloat16") return false;
  const auto interface = array.attr("__array_interface__").cast<py::dict>();
  const auto data = interface["data"].cast<py::tuple>();
  if (writable && data[1].cast<bool>()) throw usage_error("the array is read-only");
  if (interface.contains("strides") && !interface["strides"].is_none()) {
    throw usage_error("the array is not C-contiguous; pass a contiguous copy");
  }
  data_ = reinterpret_cast<void*>(data[0].cast<uintptr_t>());
  count_ = array.attr("size").cast<size_t>();
  dtype_ = Dtype::kBFloat16;
  keeper_ = py::reinterpret_borrow<py::object>(array);
  return true;
}

bool ArrayView::from_dlpack(py::handle array) {
  if (!py::hasattr(array, "__dlpack__") || !py::hasattr(array, "__dlpack_device__")) return false;
  const auto device = array.attr("__dlpack_device__")().cast<py::tuple>();
  if (device[0].cast<int>() != kDLCPU) {
    throw usage_error("the array lies on another device than the CPU");
  }
  const py::object capsule = array.attr("__dlpack__")();
  auto* managed = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"));
  if (managed == nullptr) throw py::error_already_set();
  PyCapsule_SetName(capsule.ptr(), "used_dltensor");
  managed_ = managed;
  const DLTensor& tensor = managed->dl_tensor;
  if (!is_contiguous(tensor)) {
    throw usage_error("the array is not C-contiguous; pass a contiguous copy");
  }
  dtype_ = from_dl(tensor.dtype);
  count_ = 1;
  for (int i = 0; i < tensor.ndim; ++i) count_ *= tensor.shape[i];
  data_ = static_cast<std::byte*>(tensor.data) + tensor.byte_offset;
  return true;
}

}  // namespace dpcomm
