#include "bind/core_plain_array.h"

#include <cstdint>
#include <cstring>

#include "bind/core_dlpack.h"

namespace dpcomm {
namespace {

// --- NumPy: its arrays begin like this in all versions 1 and 2 ("Array structure" in its C API),
// which is part of its binary interface; is_as_expected() compares with what Python says.
struct NumpyDescr {
  PyObject_HEAD PyObject* type_object;
  char kind;
  char type;
  char byteorder;
  char flags;
  int type_number;
};

struct NumpyArray {
  PyObject_HEAD char* data;
  int dimensions;
  Py_ssize_t* shape;
  Py_ssize_t* strides;
  PyObject* base;
  NumpyDescr* descr;
  int flags;
};

constexpr unsigned kContiguous = 0x1, kWritable = 0x400, kWarnsOnWrite = 1u << 31;

/// The dtype of a type number of NumPy's; false for those that dpcomm does not have.
bool numpy_dtype(int number, Dtype& dtype) {
  switch (number) {
    case 0:
      dtype = Dtype::kBool;
      return true;
    case 1:
      dtype = Dtype::kInt8;
      return true;
    case 2:
      dtype = Dtype::kUint8;
      return true;
    case 3:
      dtype = Dtype::kInt16;
      return true;
    case 5:
      dtype = Dtype::kInt32;
      return true;
    case 7:  // long
      dtype = sizeof(long) == 8 ? Dtype::kInt64 : Dtype::kInt32;
      return true;
    case 9:  // long long
      dtype = Dtype::kInt64;
      return true;
    case 11:
      dtype = Dtype::kFloat32;
      return true;
    case 12:
      dtype = Dtype::kFloat64;
      return true;
    case 23:
      dtype = Dtype::kFloat16;
      return true;
    default:
      return false;
  }
}

bool see_numpy(PyObject* object, PlainArray& array) {
  const auto* seen = reinterpret_cast<const NumpyArray*>(object);
  const auto flags = static_cast<unsigned>(seen->flags);
  if ((flags & kContiguous) == 0 || (flags & kWarnsOnWrite) != 0) return false;
  if (seen->descr->byteorder != '=' && seen->descr->byteorder != '|') return false;
  if (!numpy_dtype(seen->descr->type_number, array.dtype)) return false;
  array.data = seen->data;
  array.writable = (flags & kWritable) != 0;
  array.count = 1;
  for (int i = 0; i < seen->dimensions; ++i) array.count *= static_cast<size_t>(seen->shape[i]);
  return true;
}

/// What Python has for it; null where that fails.
class Found {
 public:
  explicit Found(PyObject* object) : object_(object) { PyErr_Clear(); }
  ~Found() { Py_XDECREF(object_); }
  Found(const Found&) = delete;
  Found& operator=(const Found&) = delete;
  PyObject* get() const { return object_; }
  Found at(const char* attribute) const {
    return Found(object_ == nullptr ? nullptr : PyObject_GetAttrString(object_, attribute));
  }
  bool is(long long number) const {
    const long long own = object_ == nullptr ? -1 : PyLong_AsLongLong(object_);
    const bool failed = PyErr_Occurred() != nullptr;
    PyErr_Clear();
    return object_ != nullptr && !failed && own == number;
  }

 private:
  PyObject* object_;
};

/// True if the array in memory says of itself what it says in Python.
bool is_as_expected(PyObject* object) {
  const auto* seen = reinterpret_cast<const NumpyArray*>(object);
  const Found array(Py_NewRef(object));
  const Found descr = array.at("dtype");
  if (descr.get() != reinterpret_cast<PyObject*>(seen->descr)) return false;
  const Found interface = array.at("__array_interface__");
  if (interface.get() == nullptr || !PyDict_Check(interface.get())) return false;
  PyObject* const data = PyDict_GetItemString(interface.get(), "data");  // borrowed
  if (data == nullptr || !PyTuple_Check(data) || PyTuple_GET_SIZE(data) < 1) return false;
  long long count = 1;
  for (int i = 0; i < seen->dimensions; ++i) count *= seen->shape[i];
  return array.at("ndim").is(seen->dimensions) && array.at("size").is(count) &&
         array.at("flags").at("num").is(seen->flags) &&
         descr.at("num").is(seen->descr->type_number) &&
         Found(Py_NewRef(PyTuple_GET_ITEM(data, 0))).is(reinterpret_cast<intptr_t>(seen->data));
}

// --- torch: through the table of functions by which it gives a DLTensor without a capsule.
const DLPackExchangeAPI* torch_api = nullptr;
PyObject* requires_grad = nullptr;  // the interned string

bool dl_dtype(const DLDataType& type, Dtype& dtype) {
  if (type.lanes != 1) return false;
  switch (type.code << 8 | type.bits) {
    case kDLFloat << 8 | 32:
      dtype = Dtype::kFloat32;
      return true;
    case kDLFloat << 8 | 64:
      dtype = Dtype::kFloat64;
      return true;
    case kDLFloat << 8 | 16:
      dtype = Dtype::kFloat16;
      return true;
    case kDLBfloat << 8 | 16:
      dtype = Dtype::kBFloat16;
      return true;
    case kDLInt << 8 | 8:
      dtype = Dtype::kInt8;
      return true;
    case kDLInt << 8 | 16:
      dtype = Dtype::kInt16;
      return true;
    case kDLInt << 8 | 32:
      dtype = Dtype::kInt32;
      return true;
    case kDLInt << 8 | 64:
      dtype = Dtype::kInt64;
      return true;
    case kDLUInt << 8 | 8:
      dtype = Dtype::kUint8;
      return true;
    case kDLBool << 8 | 8:
      dtype = Dtype::kBool;
      return true;
    default:
      return false;
  }
}

bool see_torch(PyObject* object, PlainArray& array) {
  // What __dlpack__ refuses, the table gives.
  PyObject* const wants_gradient = PyObject_GetAttr(object, requires_grad);
  Py_XDECREF(wants_gradient);
  DLTensor tensor;
  if (wants_gradient != Py_False ||
      torch_api->dltensor_from_py_object_no_sync(object, &tensor) != 0) {
    PyErr_Clear();
    return false;
  }
  if (tensor.device.device_type != kDLCPU || !dl_dtype(tensor.dtype, array.dtype)) return false;
  if (!is_contiguous(tensor.ndim, tensor.shape, tensor.strides, 1)) return false;
  array.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
  array.writable = true;
  array.count = 1;
  for (int i = 0; i < tensor.ndim; ++i) array.count *= static_cast<size_t>(tensor.shape[i]);
  return true;
}

// --- whose types they are.
struct Kind {
  const char* module;
  const char* name;
  const char* own_name;  ///< of the type in C
  bool (*is_usable)(PyObject* object);
  PyTypeObject* type = nullptr;  ///< null: not seen yet; then kept for ever
  bool usable = false;
};

bool has_torch_api(PyObject* object) {
  const Found type(Py_NewRef(reinterpret_cast<PyObject*>(Py_TYPE(object))));
  const Found capsule = type.at("__dlpack_c_exchange_api__");
  if (capsule.get() == nullptr) return false;
  const auto* api = static_cast<const DLPackExchangeAPI*>(
      PyCapsule_GetPointer(capsule.get(), "dlpack_exchange_api"));  // as long as the process lives
  PyErr_Clear();
  requires_grad = PyUnicode_InternFromString("requires_grad");
  torch_api = api;
  return api != nullptr && requires_grad != nullptr && api->header.version.major == kDLMajor &&
         api->dltensor_from_py_object_no_sync != nullptr;
}

Kind numpy_kind{"numpy", "ndarray", "numpy.ndarray", &is_as_expected};
Kind torch_kind{"torch", "Tensor", "Tensor", &has_torch_api};

/// True if `object` is of a type that was not known before, and now is.
bool learn(Kind& kind, PyObject* object) {
  PyTypeObject* const type = Py_TYPE(object);
  if (kind.type != nullptr || std::strcmp(type->tp_name, kind.own_name) != 0) return false;
  PyObject* const module = PyDict_GetItemString(PyImport_GetModuleDict(), kind.module);  // borrowed
  if (module == nullptr) return false;
  const Found found = Found(Py_NewRef(module)).at(kind.name);
  if (found.get() != reinterpret_cast<PyObject*>(type)) return false;
  Py_INCREF(type);
  kind.type = type;
  kind.usable = kind.is_usable(object);
  return true;
}

}  // namespace

bool see_plain_array(PyObject* object, PlainArray& array) {
  PyTypeObject* const type = Py_TYPE(object);
  if (type == numpy_kind.type) return numpy_kind.usable && see_numpy(object, array);
  if (type == torch_kind.type) return torch_kind.usable && see_torch(object, array);
  const bool learned = learn(numpy_kind, object) || learn(torch_kind, object);
  return learned && see_plain_array(object, array);
}

}  // namespace dpcomm
