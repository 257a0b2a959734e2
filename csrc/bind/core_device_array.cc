// The two protocols by which libraries hand over arrays that may lie on a device.
//
// DLPack comes first: it names the device, it knows bfloat16, and it orders the contents before the
// stream on which they will be used. __cuda_array_interface__ (version 3 and before) does neither.
#include <pybind11/stl.h>

#include <cstring>
#include <string>
#include <vector>

#include "base/error.h"
#include "bind/core_array.h"
#include "bind/core_bindings.h"
#include "bind/core_dlpack.h"

namespace py = pybind11;

namespace dpcomm {
namespace {

Dtype from_dl(const DLDataType& type) {
  const std::string what =
      str("with DLPack code ", int(type.code), " of ", int(type.bits), " bits");
  if (type.lanes == 1) {
    if (type.code == kDLBfloat && type.bits == 16) return Dtype::kBFloat16;
    if (type.code == kDLBool && type.bits == 8) return Dtype::kBool;
    if (type.code == kDLInt) return integer_dtype(type.bits / 8, true, what);
    if (type.code == kDLUInt) return integer_dtype(type.bits / 8, false, what);
    if (type.code == kDLFloat && type.bits == 16) return Dtype::kFloat16;
    if (type.code == kDLFloat && type.bits == 32) return Dtype::kFloat32;
    if (type.code == kDLFloat && type.bits == 64) return Dtype::kFloat64;
  }
  throw usage_error("dtype ", what, " is not supported");
}

size_t elements(int ndim, const int64_t* shape) {
  size_t count = 1;
  for (int i = 0; i < ndim; ++i) {
    if (shape[i] < 0) throw usage_error("the array has a negative dimension");
    count *= static_cast<size_t>(shape[i]);
  }
  return count;
}

/// What the array's library gives for a consumer that knows version 1; libraries from before that
/// do not know the argument max_version.
py::object export_capsule(py::handle array, const py::object& stream) {
  const py::object method = array.attr("__dlpack__");
  py::dict arguments;
  if (!stream.is_none()) arguments["stream"] = stream;
  py::dict versioned(**arguments);
  versioned["max_version"] = py::make_tuple(kDLMajor, 0);
  try {
    return method(**versioned);
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_TypeError)) throw;
  }
  return method(**arguments);
}

Dtype from_typestr(const std::string& text, py::handle array) {
  const bool own_order = text.size() >= 3 && std::strchr("<|=", text[0]) != nullptr;
  const std::string rest = own_order ? text.substr(1) : "";
  if (rest == "b1") return Dtype::kBool;
  if (rest == "f2") return Dtype::kFloat16;
  if (rest == "f4") return Dtype::kFloat32;
  if (rest == "f8") return Dtype::kFloat64;
  if (rest.size() == 2 && (rest[0] == 'i' || rest[0] == 'u')) {
    return integer_dtype(rest[1] - '0', rest[0] == 'i', str("'", text, "'"));
  }
  // The protocol has no bfloat16: it comes as two bytes of anything, and only the array's own dtype
  // tells.
  if (rest == "V2" && py::hasattr(array, "dtype")) {
    const auto own_name = py::str(array.attr("dtype")).cast<std::string>();
    const auto dot = own_name.rfind('.');
    if (own_name.substr(dot == std::string::npos ? 0 : dot + 1) == "bfloat16") {
      return Dtype::kBFloat16;
    }
  }
  throw usage_error("dtype '", text, "' is not supported");
}

/// CuPy's arrays have device.id, others device as a number; -1 where there is neither.
int device_ordinal(py::handle array) {
  if (!py::hasattr(array, "device")) return -1;
  py::object device = array.attr("device");
  if (py::hasattr(device, "id")) device = device.attr("id");
  return py::isinstance<py::int_>(device) ? device.cast<int>() : -1;
}

}  // namespace

bool is_contiguous(int ndim, const int64_t* shape, const int64_t* strides, int64_t unit) {
  if (strides == nullptr) return true;
  for (int i = 0; i < ndim; ++i) {
    if (shape[i] == 0) return true;
  }
  int64_t expected = unit;
  for (int i = ndim - 1; i >= 0; --i) {
    if (shape[i] != 1 && strides[i] != expected) return false;
    expected *= shape[i];
  }
  return true;
}

bool ArrayView::from_dlpack(py::handle array, bool writable, uintptr_t stream) {
  if (!py::hasattr(array, "__dlpack__") || !py::hasattr(array, "__dlpack_device__")) return false;
  const auto device = array.attr("__dlpack_device__")().cast<py::tuple>();
  const int type = device[0].cast<int>();
  place_.on_device = type == kDLCUDA || type == kDLCUDAManaged;
  if (type == kDLROCM || type == kDLROCMHost) {
    throw usage_error("the array lies on a ROCm device; dpcomm knows CUDA devices only");
  }
  if (!place_.on_device && type != kDLCPU && type != kDLCUDAHost) {
    throw usage_error("the array lies on another device than the CPU or a CUDA device (type ", type,
                      " of DLPack)");
  }
  if (type == kDLCUDA) place_.device = device[1].cast<int>();
  py::object on_stream = py::none();
  if (place_.on_device) on_stream = py::int_(stream == 0 ? 1 : stream);  // 1: legacy default
  const py::object capsule = export_capsule(array, on_stream);
  const DLTensor* tensor = nullptr;
  uint64_t flags = 0;
  if (PyCapsule_IsValid(capsule.ptr(), "dltensor_versioned")) {
    auto* managed = static_cast<DLManagedTensorVersioned*>(
        PyCapsule_GetPointer(capsule.ptr(), "dltensor_versioned"));
    PyCapsule_SetName(capsule.ptr(), "used_dltensor_versioned");
    managed_versioned_ = managed;
    if (managed->major != kDLMajor) {
      throw usage_error("the array comes as DLPack ", managed->major, ".", managed->minor,
                        "; dpcomm knows version ", kDLMajor);
    }
    flags = managed->flags;
    tensor = &managed->dl_tensor;
  } else {
    auto* managed = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"));
    if (managed == nullptr) throw py::error_already_set();
    PyCapsule_SetName(capsule.ptr(), "used_dltensor");
    managed_ = managed;
    tensor = &managed->dl_tensor;
  }
  if (writable && (flags & kDLReadOnly) != 0) refuse_read_only();
  if (writable && (flags & kDLCopied) != 0) {
    throw usage_error("the array's library gives a copy of it, where a result would be lost");
  }
  if (!is_contiguous(tensor->ndim, tensor->shape, tensor->strides, 1)) refuse_strides();
  dtype_ = from_dl(tensor->dtype);
  count_ = elements(tensor->ndim, tensor->shape);
  data_ = static_cast<std::byte*>(tensor->data) + tensor->byte_offset;
  return true;
}

bool ArrayView::from_cuda_array_interface(py::handle array, bool writable) {
  if (!py::hasattr(array, "__cuda_array_interface__")) return false;
  const auto interface = array.attr("__cuda_array_interface__").cast<py::dict>();
  for (const char* key : {"shape", "typestr", "data"}) {
    if (!interface.contains(key)) {
      throw usage_error("the __cuda_array_interface__ of '", Py_TYPE(array.ptr())->tp_name,
                        "' has no ", key);
    }
  }
  const auto optional = [&interface](const char* key) {
    return interface.contains(key) ? py::object(interface[key]) : py::none();
  };
  if (!optional("mask").is_none()) throw usage_error("an array with a mask is not supported");
  const auto data = interface["data"].cast<py::tuple>();
  if (writable && data[1].cast<bool>()) refuse_read_only();
  const auto shape = interface["shape"].cast<std::vector<int64_t>>();
  const int ndim = static_cast<int>(shape.size());
  count_ = elements(ndim, shape.data());
  dtype_ = from_typestr(interface["typestr"].cast<std::string>(), array);
  if (const py::object given = optional("strides"); !given.is_none()) {
    const auto strides = given.cast<std::vector<int64_t>>();
    if (strides.size() != shape.size()) throw usage_error("the array has strides of another shape");
    if (!is_contiguous(ndim, shape.data(), strides.data(), size_bytes(dtype_))) refuse_strides();
  }
  data_ = reinterpret_cast<void*>(data[0].cast<uintptr_t>());
  place_ = ArrayPlace{true, device_ordinal(array)};
  keeper_ = py::reinterpret_borrow<py::object>(array);
  return true;
}

void bind_array(py::module_& module) {
  module.def(
      "describe_array",
      [](py::handle array, bool writable, uintptr_t stream) {
        const ArrayView view(array, writable, stream);
        return py::make_tuple(reinterpret_cast<uintptr_t>(view.data()), view.count(),
                              name(view.dtype()), describe(view.place()));
      },
      py::arg("array"), py::arg("writable") = false, py::arg("stream") = 0,
      "(address, elements, dtype, place) of what collectives would take from an array.");
}

}  // namespace dpcomm
