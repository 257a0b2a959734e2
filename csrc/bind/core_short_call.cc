#include "bind/core_short_call.h"

#include <structmember.h>

#include <cstddef>

#include "base/error.h"
#include "bind/core_bindings.h"
#include "bind/core_plain_array.h"
#include "bind/core_signals.h"
#include "comm/communicator.h"

namespace py = pybind11;

namespace dpcomm {
namespace {

enum Argument { kArray, kOp, kRoot, kOut, kArguments };
constexpr const char* kNames[kArguments] = {"array", "op", "root", "out"};

/// What a method takes on the short way.
struct Method {
  Collective collective;
  int positional;  ///< so many of `order` may come without a name
  Argument order[3];
  bool takes_out;
  bool needs_out;  ///< else the method makes the result
};

constexpr Method kMethods[] = {
    {Collective::kAllReduce, 2, {kArray, kOp}, true, false},
    {Collective::kReduce, 3, {kArray, kRoot, kOp}, true, false},
    {Collective::kBroadcast, 2, {kArray, kRoot}, false, false},
    {Collective::kAllGather, 1, {kArray}, true, true},
    {Collective::kReduceScatter, 2, {kArray, kOp}, true, true},
    {Collective::kBarrier, 0, {}, false, false},
};

/// Interned strings, made once and kept.
struct Strings {
  PyObject* arguments[kArguments];
  PyObject* ops[kReduceOps];
  PyObject* core = PyUnicode_InternFromString("_core");
  Strings() {
    for (int i = 0; i < kArguments; ++i) arguments[i] = PyUnicode_InternFromString(kNames[i]);
    for (int i = 0; i < kReduceOps; ++i) {
      ops[i] = PyUnicode_InternFromString(name(static_cast<ReduceOp>(i)));
    }
  }
};
const Strings* strings = nullptr;

/// The object that stands for the method in the class.
struct ShortCall {
  PyObject_HEAD vectorcallfunc call;
  const Method* method;
  PyObject* function;
  PyObject* dict;
};

/// Borrowed from the caller.
using Arguments = PyObject* [kArguments];

bool takes(const Method& method, Argument argument) {
  if (argument == kOut) return method.takes_out;
  for (int i = 0; i < method.positional; ++i) {
    if (method.order[i] == argument) return true;
  }
  return false;
}

/// Sorts the arguments behind `self`; false for a call that is not for the short way.
bool sort(const Method& method, PyObject* const* values, Py_ssize_t positional, PyObject* names,
          Arguments& arguments) {
  if (positional > method.positional) return false;
  for (Py_ssize_t i = 0; i < positional; ++i) arguments[method.order[i]] = values[i];
  const Py_ssize_t named = names == nullptr ? 0 : PyTuple_GET_SIZE(names);
  for (Py_ssize_t i = 0; i < named; ++i) {
    PyObject* const given = PyTuple_GET_ITEM(names, i);
    int which = 0;
    while (which < kArguments && strings->arguments[which] != given) ++which;
    if (which == kArguments || !takes(method, static_cast<Argument>(which)) ||
        arguments[which] != nullptr) {
      return false;
    }
    arguments[which] = values[positional + i];
  }
  if (arguments[kOut] == Py_None) arguments[kOut] = nullptr;
  const bool has_array = arguments[kArray] != nullptr;
  return has_array == (method.positional > 0) && (arguments[kOut] != nullptr || !method.needs_out);
}

bool find_op(PyObject* given, ReduceOp& op) {
  if (given == nullptr) return true;  // the default
  for (int i = 0; i < kReduceOps; ++i) {
    if (strings->ops[i] != given) continue;
    op = static_cast<ReduceOp>(i);
    return true;
  }
  return false;
}

bool find_root(PyObject* given, int& root) {
  if (given == nullptr) return true;
  if (!PyLong_CheckExact(given)) return false;
  int overflow = 0;
  const long value = PyLong_AsLongAndOverflow(given, &overflow);
  root = static_cast<int>(value);
  return overflow == 0 && root == value;
}

/// Fills in the operation; `result` becomes what the method gives. False for what is not for the
/// short way, mistakes included.
bool describe(const Method& method, const Arguments& arguments, const Communicator& communicator,
              Operation& operation, PyObject*& result) {
  operation.collective = method.collective;
  if (arguments[kArray] == nullptr) return true;
  if (!find_op(arguments[kOp], operation.op) || !find_root(arguments[kRoot], operation.root)) {
    return false;
  }
  PlainArray in, out;
  if (!see_plain_array(arguments[kArray], in)) return false;
  const bool only_sends =
      method.collective == Collective::kReduce && communicator.rank() != operation.root;
  PyObject* const given_out = only_sends ? nullptr : arguments[kOut];
  if (given_out == nullptr) {
    out = in;
  } else if (!see_plain_array(given_out, out)) {
    return false;
  }
  const size_t world = static_cast<size_t>(communicator.world());
  const bool gathers = method.collective == Collective::kAllGather;
  const bool scatters = method.collective == Collective::kReduceScatter;
  operation.count = scatters ? out.count : in.count;
  if (in.dtype != out.dtype || in.count != operation.count * (scatters ? world : 1) ||
      out.count != operation.count * (gathers ? world : 1) || (!out.writable && !only_sends)) {
    return false;
  }
  operation.dtype = in.dtype;
  operation.input = in.data;
  operation.output = only_sends ? nullptr : out.data;
  result = given_out == nullptr ? arguments[kArray] : given_out;
  return true;
}

/// Runs the operation as PyCommunicator::run() does; null with a Python error.
PyObject* run(Shared& shared, Operation& operation, PyObject* result) {
  try {
    if (!shared.flying.empty()) shared.sweep();
    with_signals([&](const auto& interrupted) {
      operation.interrupted = interrupted;
      shared.communicator->run(operation);
    });
    return Py_NewRef(result);
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const Error& error) {
    set_python_error(error);
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

/// `values` are those of a call whose first one is the Communicator. True if the call was for the
/// short way.
bool call_shortly(const Method& method, PyObject* const* values, Py_ssize_t positional,
                  PyObject* names, PyObject*& result) {
  Arguments arguments = {};
  if (positional < 1 || !sort(method, values + 1, positional - 1, names, arguments)) return false;
  const py::object core =
      py::reinterpret_steal<py::object>(PyObject_GetAttr(values[0], strings->core));
  if (!core) {
    PyErr_Clear();
    return false;
  }
  const std::shared_ptr<Shared>* shared = shared_of(core.ptr());
  if (shared == nullptr || *shared == nullptr || (*shared)->communicator == nullptr) return false;
  Operation operation;
  PyObject* gives = Py_None;
  if (!describe(method, arguments, *(*shared)->communicator, operation, gives)) return false;
  // The caller holds the arguments; these say so to whoever counts before it resizes an array.
  const py::object array = py::reinterpret_borrow<py::object>(arguments[kArray]);
  const py::object out = py::reinterpret_borrow<py::object>(arguments[kOut]);
  result = run(**shared, operation, gives);
  return true;
}

PyObject* call(PyObject* self, PyObject* const* values, size_t flags, PyObject* names) {
  const auto* method = reinterpret_cast<const ShortCall*>(self);
  PyObject* result = nullptr;
  if (call_shortly(*method->method, values, PyVectorcall_NARGS(flags), names, result)) {
    return result;
  }
  return PyObject_Vectorcall(method->function, values, flags, names);
}

PyObject* bind(PyObject* self, PyObject* object, PyObject* /*type*/) {
  if (object == nullptr || object == Py_None) return Py_NewRef(self);
  return PyMethod_New(self, object);
}

PyObject* represent(PyObject* self) {
  return PyObject_Repr(reinterpret_cast<ShortCall*>(self)->function);
}

int traverse(PyObject* self, visitproc visit, void* arg) {
  auto* method = reinterpret_cast<ShortCall*>(self);
  Py_VISIT(method->function);
  Py_VISIT(method->dict);
  Py_VISIT(Py_TYPE(self));
  return 0;
}

int clear(PyObject* self) {
  auto* method = reinterpret_cast<ShortCall*>(self);
  Py_CLEAR(method->function);
  Py_CLEAR(method->dict);
  return 0;
}

void deallocate(PyObject* self) {
  PyTypeObject* const type = Py_TYPE(self);
  PyObject_GC_UnTrack(self);
  clear(self);
  type->tp_free(self);
  Py_DECREF(type);
}

PyMemberDef members[] = {
    {"__vectorcalloffset__", T_PYSSIZET, offsetof(ShortCall, call), READONLY, nullptr},
    {"__dictoffset__", T_PYSSIZET, offsetof(ShortCall, dict), READONLY, nullptr},
    {nullptr, 0, 0, 0, nullptr},
};
PyGetSetDef properties[] = {
    {"__dict__", PyObject_GenericGetDict, PyObject_GenericSetDict, nullptr, nullptr},
    {nullptr, nullptr, nullptr, nullptr, nullptr},
};
PyType_Slot slots[] = {
    {Py_tp_call, reinterpret_cast<void*>(&PyVectorcall_Call)},
    {Py_tp_descr_get, reinterpret_cast<void*>(&bind)},
    {Py_tp_repr, reinterpret_cast<void*>(&represent)},
    {Py_tp_traverse, reinterpret_cast<void*>(&traverse)},
    {Py_tp_clear, reinterpret_cast<void*>(&clear)},
    {Py_tp_dealloc, reinterpret_cast<void*>(&deallocate)},
    {Py_tp_members, members},
    {Py_tp_getset, properties},
    {0, nullptr},
};
// A method descriptor: `communicator.all_reduce(array)` calls it without making a bound method.
PyType_Spec spec = {"dpcomm._core._ShortCall", sizeof(ShortCall), 0,
                    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_HAVE_VECTORCALL |
                        Py_TPFLAGS_METHOD_DESCRIPTOR | Py_TPFLAGS_IMMUTABLETYPE |
                        Py_TPFLAGS_DISALLOW_INSTANTIATION,
                    slots};
PyTypeObject* short_call_type = nullptr;

}  // namespace

py::object with_short_call(const py::object& function) {
  const auto wanted = function.attr("__name__").cast<std::string>();
  for (const Method& method : kMethods) {
    if (wanted != name(method.collective)) continue;
    auto* made = PyObject_GC_New(ShortCall, short_call_type);
    if (made == nullptr) throw py::error_already_set();
    made->call = &call;
    made->method = &method;
    made->function = Py_NewRef(function.ptr());
    made->dict = nullptr;
    PyObject_GC_Track(made);
    const auto object = py::reinterpret_steal<py::object>(reinterpret_cast<PyObject*>(made));
    py::module_::import("functools").attr("update_wrapper")(object, function);
    return object;
  }
  throw usage_error("no method named ", wanted, " has a short call");
}

void bind_short_call(py::module_& module) {
  static const Strings made;
  strings = &made;
  short_call_type = reinterpret_cast<PyTypeObject*>(PyType_FromSpec(&spec));
  if (short_call_type == nullptr) throw py::error_already_set();
  module.def("_with_short_call", &with_short_call, py::arg("function"));
}

}  // namespace dpcomm
