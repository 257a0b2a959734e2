// Codecs over the buffer protocol, for tests and tools. Everything works in place.
#include <pybind11/stl.h>

#include <memory>
#include <string>
#include <vector>

#include "base/error.h"
#include "base/names.h"
#include "bind/core_bindings.h"
#include "wire/codec.h"

namespace dpcomm {
namespace {

namespace py = pybind11;

Dtype dtype_by_name(const std::string& wanted) { return by_name<Dtype>(wanted, kDtypes, "dtype"); }
Isa isa_by_name(const std::string& wanted) {
  return by_name<Isa>(wanted, kIsas, "instruction set");
}

const Codec& find_codec(const std::string& wire, const std::string& dtype, const std::string& isa) {
  return wire_codec(by_name<WireFormat>(wire, kWireFormats, "wire format"), dtype_by_name(dtype),
                    isa_by_name(isa));
}

/// The bytes of a contiguous object that has the buffer protocol, for the time of a call.
class Bytes {
 public:
  Bytes(const py::object& object, bool writable) {
    if (PyObject_GetBuffer(object.ptr(), &view_, writable ? PyBUF_WRITABLE : PyBUF_SIMPLE) != 0) {
      throw py::error_already_set();
    }
  }
  ~Bytes() { PyBuffer_Release(&view_); }
  Bytes(const Bytes&) = delete;
  Bytes& operator=(const Bytes&) = delete;

  /// Where they start. Throws UsageError if there are fewer than `wanted`.
  void* at_least(size_t wanted) const {
    if (static_cast<size_t>(view_.len) < wanted) {
      throw usage_error("a buffer of ", view_.len, " bytes, ", wanted, " needed");
    }
    return view_.buf;
  }
  size_t size() const { return static_cast<size_t>(view_.len); }

 private:
  Py_buffer view_;
};

/// [first, first + n) of `total` in blocks of `wire`, as wire/codec.h demands it.
void check_range(const std::string& wire, size_t total, size_t first, size_t n) {
  const size_t block = block_elems(by_name<WireFormat>(wire, kWireFormats, "wire format"));
  const bool inside = first <= total && n <= total - first;
  if (!inside || first % block != 0 || (n % block != 0 && first + n != total)) {
    throw usage_error("elements ", first, " to ", first + n, " of ", total,
                      " are no tile of wire format ", wire);
  }
}

/// The accumulator and the slice of one call of a codec.
struct Operands {
  Operands(const std::string& wire, const std::string& dtype, const std::string& isa,
           const py::object& acc_object, const py::object& base_object, size_t total, size_t first,
           size_t n, bool writes_base)
      : codec(find_codec(wire, dtype, isa)),
        acc_bytes(acc_object, true),
        base_bytes(base_object, writes_base) {
    check_range(wire, total, first, n);
    acc = acc_bytes.at_least(n * accumulator_bytes(dtype_by_name(dtype)));
    base = base_bytes.at_least(codec.slice_bytes(total));
  }

  const Codec& codec;
  Bytes acc_bytes;
  Bytes base_bytes;
  void* acc;
  void* base;
};

void load(const std::string& wire, const std::string& dtype, const std::string& isa,
          const py::object& acc, const py::object& base, size_t total, size_t first, size_t n) {
  const Operands at(wire, dtype, isa, acc, base, total, first, n, false);
  at.codec.load(at.acc, at.base, total, first, n);
}

void combine(const std::string& wire, const std::string& dtype, const std::string& isa,
             const std::string& op, const py::object& acc, const py::object& base, size_t total,
             size_t first, size_t n) {
  const Operands at(wire, dtype, isa, acc, base, total, first, n, false);
  const auto run =
      at.codec.combine[static_cast<int>(by_name<ReduceOp>(op, kReduceOps, "operator"))];
  if (run == nullptr) throw usage_error(op, " on ", dtype, " in wire format ", wire);
  run(at.acc, at.base, total, first, n);
}

void store(const std::string& wire, const std::string& dtype, const std::string& isa,
           const py::object& base, const py::object& acc, size_t total, size_t first, size_t n,
           bool keep) {
  const Operands at(wire, dtype, isa, acc, base, total, first, n, true);
  at.codec.store(at.base, total, first, at.acc, n, keep);
}

void premultiply(const std::string& dtype, const std::string& isa, const py::object& acc,
                 double factor) {
  const Dtype type = dtype_by_name(dtype);
  const auto run = accumulator_ops(type, isa_by_name(isa)).premultiply;
  if (run == nullptr) throw usage_error("premul_sum on ", dtype);
  const Bytes bytes(acc, true);
  run(bytes.at_least(0), factor, bytes.size() / accumulator_bytes(type));
}

void divide(const std::string& dtype, const std::string& isa, const py::object& acc,
            int64_t divisor) {
  const Dtype type = dtype_by_name(dtype);
  const auto run = accumulator_ops(type, isa_by_name(isa)).divide;
  if (run == nullptr || divisor <= 0) throw usage_error("avg on ", dtype, " by ", divisor);
  const Bytes bytes(acc, true);
  run(bytes.at_least(0), divisor, bytes.size() / accumulator_bytes(type));
}

void sum(const std::string& isa, const std::vector<py::object>& destinations,
         const std::vector<py::object>& sources, int64_t divisor, size_t n) {
  if (sources.empty() || divisor <= 0) throw usage_error("a sum of no arrays, or divisor <= 0");
  std::vector<std::unique_ptr<Bytes>> held;
  std::vector<float*> to;
  std::vector<const float*> from;
  for (const py::object& object : destinations) {
    held.push_back(std::make_unique<Bytes>(object, true));
    to.push_back(static_cast<float*>(held.back()->at_least(n * sizeof(float))));
  }
  for (const py::object& object : sources) {
    held.push_back(std::make_unique<Bytes>(object, false));
    from.push_back(static_cast<const float*>(held.back()->at_least(n * sizeof(float))));
  }
  sum_f32(isa_by_name(isa))(to.data(), static_cast<int>(to.size()), from.data(),
                            static_cast<int>(from.size()), divisor, n);
}

std::vector<std::string> isas() {
  std::vector<std::string> found;
  for (int i = 0; i < kIsas; ++i) {
    if (isa_available(static_cast<Isa>(i))) found.push_back(name(static_cast<Isa>(i)));
  }
  return found;
}

}  // namespace

void bind_wire(py::module_& module) {
  module.def("wire_isas", isas);
  module.def("wire_best_isa", [] { return std::string(name(best_isa())); });
  module.def(
      "wire_slice_bytes",
      [](const std::string& wire, const std::string& dtype, size_t total) {
        return find_codec(wire, dtype, "scalar").slice_bytes(total);
      },
      py::arg("wire"), py::arg("dtype"), py::arg("total"));
  module.def("wire_load", load, py::arg("wire"), py::arg("dtype"), py::arg("isa"), py::arg("acc"),
             py::arg("base"), py::arg("total"), py::arg("first"), py::arg("n"));
  module.def("wire_combine", combine, py::arg("wire"), py::arg("dtype"), py::arg("isa"),
             py::arg("op"), py::arg("acc"), py::arg("base"), py::arg("total"), py::arg("first"),
             py::arg("n"));
  module.def("wire_store", store, py::arg("wire"), py::arg("dtype"), py::arg("isa"),
             py::arg("base"), py::arg("acc"), py::arg("total"), py::arg("first"), py::arg("n"),
             py::arg("keep"));
  module.def("wire_premultiply", premultiply, py::arg("dtype"), py::arg("isa"), py::arg("acc"),
             py::arg("factor"));
  module.def("wire_divide", divide, py::arg("dtype"), py::arg("isa"), py::arg("acc"),
             py::arg("divisor"));
  module.def("wire_sum_f32", sum, py::arg("isa"), py::arg("destinations"), py::arg("sources"),
             py::arg("divisor"), py::arg("n"));
}

}  // namespace dpcomm
