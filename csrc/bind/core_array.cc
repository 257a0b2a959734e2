#include "bind/core_array.h"

#include <cstdint>
#include <cstring>
#include <string>

#include "base/error.h"
#include "bind/core_dlpack.h"

namespace py = pybind11;

namespace dpcomm {
namespace {

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
        return integer_dtype(bytes, true, text);
      case 'B':
      case 'c':
        return integer_dtype(bytes, false, text);
      default:
        break;
    }
  }
  throw usage_error("dtype with buffer format '", text, "' is not supported");
}

}  // namespace

Dtype integer_dtype(size_t bytes, bool is_signed, const std::string& what) {
  if (bytes == 1) return is_signed ? Dtype::kInt8 : Dtype::kUint8;
  if (is_signed && bytes == 2) return Dtype::kInt16;
  if (is_signed && bytes == 4) return Dtype::kInt32;
  if (is_signed && bytes == 8) return Dtype::kInt64;
  throw usage_error("dtype ", what, " is not supported");
}

void refuse_read_only() { throw usage_error("the array is read-only"); }
void refuse_strides() {
  throw usage_error("the array is not C-contiguous; pass a contiguous copy");
}

std::string describe(const ArrayPlace& place) {
  if (!place.on_device) return "the CPU";
  return place.device < 0 ? "a CUDA device" : str("CUDA device ", place.device);
}

ArrayView::ArrayView(py::handle array, bool writable, uintptr_t stream) {
  try {
    if (from_buffer(array, writable)) return;
    if (from_numpy_bfloat16(array, writable)) return;
    if (from_dlpack(array, writable, stream)) return;
    if (from_cuda_array_interface(array, writable)) return;
    throw usage_error("'", Py_TYPE(array.ptr())->tp_name,
                      "' is not an array: it has neither the buffer protocol nor DLPack nor "
                      "__cuda_array_interface__");
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
  auto* versioned = static_cast<DLManagedTensorVersioned*>(managed_versioned_);
  if (versioned != nullptr && versioned->deleter != nullptr) versioned->deleter(versioned);
  managed_versioned_ = nullptr;
}

bool ArrayView::from_buffer(py::handle array, bool writable) {
  if (!PyObject_CheckBuffer(array.ptr())) return false;
  if (PyObject_GetBuffer(array.ptr(), &buffer_, PyBUF_FORMAT | PyBUF_STRIDES) != 0) {
    PyErr_Clear();  // a dtype that the buffer protocol cannot express
    return false;
  }
  has_buffer_ = true;
  if (writable && buffer_.readonly) refuse_read_only();
  if (!PyBuffer_IsContiguous(&buffer_, 'C')) refuse_strides();
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
  if (writable && data[1].cast<bool>()) refuse_read_only();
  if (interface.contains("strides") && !interface["strides"].is_none()) refuse_strides();
  data_ = reinterpret_cast<void*>(data[0].cast<uintptr_t>());
  count_ = array.attr("size").cast<size_t>();
  dtype_ = Dtype::kBFloat16;
  keeper_ = py::reinterpret_borrow<py::object>(array);
  return true;
}

}  // namespace dpcomm
