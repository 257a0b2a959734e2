// Communicator for Python: arrays in, collectives out.
#include <pybind11/stl.h>

#include <algorithm>

#include "base/env.h"
#include "base/error.h"
#include "base/names.h"
#include "bind/core_array.h"
#include "bind/core_bindings.h"
#include "bind/core_short_call.h"
#include "bind/core_signals.h"
#include "bind/core_work.h"
#include "bind/stats_dict.h"
#include "comm/communicator.h"
#include "cuda/engine.h"
#include "transport/transport.h"

namespace py = pybind11;

namespace dpcomm {
namespace {

/// A store written in Python: set(key: str, value: bytes) and get(key: str, timeout_s: float) ->
/// bytes or None.
class PythonBootstrap final : public Bootstrap {
 public:
  explicit PythonBootstrap(py::object store) : store_(std::move(store)) {}

  void set(const std::string& key, const std::string& value) override {
    py::gil_scoped_acquire gil;
    store_.attr("set")(key, py::bytes(value));
  }
  void look() override {
    py::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
  }
  bool get(const std::string& key, std::chrono::milliseconds timeout, std::string& value) override {
    py::gil_scoped_acquire gil;
    const py::object found = store_.attr("get")(key, timeout.count() / 1000.0);
    if (found.is_none()) return false;
    value = found.cast<std::string>();
    return true;
  }

 private:
  py::object store_;
};

WireFormat wire_by_name(const std::string& text) {
  return by_name<WireFormat>(text, kWireFormats, "wire");
}

ReduceOp op_by_name(const std::string& text) { return by_name<ReduceOp>(text, kReduceOps, "op"); }

struct Settings {
  std::optional<std::string> wire;
  std::optional<std::string> algorithm;
  std::optional<double> timeout;
  bool async_op = false;
  uintptr_t stream = 0;  ///< cudaStream_t on which the caller uses arrays on a device
};

/// Elements of each rank's block; empty: blocks of equal size. Of an all_to_all: sent to, and
/// received from, each rank.
struct Counts {
  std::vector<size_t> sent;
  std::vector<size_t> received;
};

class PyCommunicator {
 public:
  PyCommunicator(int rank, int world, py::object store, const CommunicatorOptions& options) {
    PythonBootstrap bootstrap(std::move(store));
    GilRelease release;
    shared_->communicator = Communicator::create(rank, world, bootstrap, options);
  }

  int rank() const { return communicator().rank(); }
  int world() const { return communicator().world(); }
  std::pair<int, size_t> geometry(int lane) const {
    const LaneGeometry geometry = communicator().geometry(lane);
    return {geometry.slots, geometry.slot_bytes};
  }
  /// Names of the algorithm and the wire format that an operation would take.
  std::pair<std::string, std::string> choice(const std::string& collective, size_t count,
                                             const std::string& dtype, const std::string& op,
                                             const Settings& settings) const {
    Operation operation;
    operation.collective = by_name<Collective>(collective, kCollectives, "collective");
    operation.count = count;
    operation.dtype = by_name<Dtype>(dtype, kDtypes, "dtype");
    operation.op = op_by_name(op);
    if (settings.wire) operation.wire = wire_by_name(*settings.wire);
    if (settings.algorithm) operation.algorithm = *settings.algorithm;
    const auto [algorithm, wire] = communicator().choice(operation);
    return {algorithm, name(wire)};
  }
  Communicator& communicator() const { return *shared_->communicator; }
  const std::shared_ptr<Shared>& shared() const { return shared_; }

  /// Runs or submits `collective` over the arrays; `result` is what the caller gets back.
  py::object run(Collective collective, py::object input, py::object output, const std::string& op,
                 double factor, int root, const Settings& settings, Counts counts) {
    const bool lacks_one = input.is_none() || output.is_none();
    if (is_rooted(collective) ? input.is_none() && output.is_none() : lacks_one) {
      throw usage_error(name(collective), ": None is not an array");
    }
    auto in =
        input.is_none() ? nullptr : std::make_unique<ArrayView>(input, false, settings.stream);
    auto out =
        output.is_none() ? nullptr : std::make_unique<ArrayView>(output, true, settings.stream);
    const ArrayPlace place = place_of(collective, in.get(), out.get());
    Operation operation;
    operation.collective = collective;
    operation.op = op_by_name(op);
    operation.factor = factor;
    operation.root = root;
    operation.timeout = milliseconds_of(settings.timeout);
    if (settings.wire) operation.wire = wire_by_name(*settings.wire);
    if (settings.algorithm) operation.algorithm = *settings.algorithm;
    operation.counts = std::move(counts.sent);
    operation.recv_counts = std::move(counts.received);
    describe_buffers(operation, in.get(), out.get());
    const py::object result = output.is_none() ? input : output;
    Flight flight{nullptr, 0, std::move(in), std::move(out), result};
    shared_->sweep();
    if (place.on_device) return run_on_device(operation, place, std::move(flight), settings);
    if (settings.async_op) {
      flight.work = communicator().submit(operation);
      return py::cast(std::make_unique<PyWork>(shared_, std::move(flight)));
    }
    with_signals([&](const auto& interrupted) {
      operation.interrupted = interrupted;
      communicator().run(operation);
    });
    return result;
  }

  /// Waits for what was given to a device so far.
  void synchronize(const std::optional<double>& timeout) {
    const std::chrono::milliseconds limit = milliseconds_of(timeout);
    const uint64_t last = last_ticket_;
    if (last == 0) return;
    with_signals([&](const auto& interrupted) {
      wait_for_ticket(communicator(), last, limit, interrupted);
    });
    shared_->sweep();
  }

  void barrier(const std::optional<double>& timeout) {
    Operation operation;
    operation.collective = Collective::kBarrier;
    operation.timeout = milliseconds_of(timeout);
    with_signals([&](const auto& interrupted) {
      operation.interrupted = interrupted;
      communicator().run(operation);
    });
  }

  /// Sends or receives the array. A receive gives the rank that sent.
  py::object message(bool sends, py::object array, const std::optional<int>& peer, int64_t tag,
                     const Settings& settings) {
    const char* const what = sends ? "send" : "recv";
    if (tag < 0 || tag > UINT32_MAX) throw usage_error(what, ": tag ", tag, " is not in 0..2^32-1");
    auto view = std::make_unique<ArrayView>(array, !sends, settings.stream);
    if (view->place().on_device) {
      throw usage_error(what, ": the array lies on ", describe(view->place()),
                        "; messages are for arrays on the CPU");
    }
    const auto limit = milliseconds_of(settings.timeout);
    const size_t bytes = view->count() * size_bytes(view->dtype());
    void* const data = view->data();
    shared_->sweep();
    Flight flight{nullptr, 0, std::move(view), nullptr, py::none(), !sends};
    const int rank = peer.value_or(Communicator::kAnySource);
    {
      GilRelease release;
      flight.work = sends
                        ? communicator().send(rank, static_cast<uint32_t>(tag), data, bytes, limit)
                        : communicator().recv(rank, static_cast<uint32_t>(tag), data, bytes, limit);
    }
    if (settings.async_op) return py::cast(std::make_unique<PyWork>(shared_, std::move(flight)));
    with_signals([&](const auto& interrupted) {
      if (flight.work->wait({}, interrupted)) return;
      communicator().abort(str("rank ", communicator().rank(), " was interrupted in ", what));
      flight.work->wait();  // the array is the caller's
    });
    return sends ? py::object(py::none()) : py::int_(flight.work->source());
  }

  void close() {
    GilRelease release;
    communicator().close();
  }

 private:
  /// Enqueues the operation. The arrays are kept until it is over, as both protocols ask for, also
  /// where the caller does not wait.
  py::object run_on_device(const Operation& operation, const ArrayPlace& place, Flight flight,
                           const Settings& settings) {
    void* const stream = reinterpret_cast<void*>(settings.stream);
    const void* const memory = operation.input != nullptr ? operation.input : operation.output;
    int device = place.device;
    communicator().check_on_device(operation);
    with_signals([&](const auto& interrupted) {
      // __cuda_array_interface__ does not say where the memory is.
      if (device < 0 && memory != nullptr) device = device_of(memory);
      if (device < 0) device = device_;
      communicator().open_device(device, nullptr, interrupted);
      flight.ticket = communicator().enqueue(operation, stream);
    });
    device_ = device;
    last_ticket_ = std::max(last_ticket_, flight.ticket);
    auto work = std::make_unique<PyWork>(shared_, std::move(flight), settings.stream);
    return settings.async_op ? py::cast(std::move(work)) : work->wait(std::nullopt, py::none());
  }

  /// Where the arrays lie; both in one place.
  static ArrayPlace place_of(Collective collective, const ArrayView* in, const ArrayView* out) {
    if (in == nullptr) return out->place();
    if (out == nullptr) return in->place();
    ArrayPlace place = in->place();
    const ArrayPlace& other = out->place();
    const bool differ = place.device != other.device && place.device >= 0 && other.device >= 0;
    if (place.on_device != other.on_device || differ) {
      throw usage_error(name(collective), ": input lies on ", describe(place), ", output on ",
                        describe(other));
    }
    if (place.device < 0) place.device = other.device;
    return place;
  }

  void describe_buffers(Operation& operation, const ArrayView* in, const ArrayView* out) const {
    const ArrayView& any = in != nullptr ? *in : *out;
    operation.dtype = any.dtype();
    operation.input = in != nullptr ? in->data() : nullptr;
    operation.output = out != nullptr ? out->data() : nullptr;
    if (in != nullptr && out != nullptr && in->dtype() != out->dtype()) {
      throw usage_error(name(operation.collective), ": input is ", name(in->dtype()),
                        ", output is ", name(out->dtype()));
    }
    const size_t world = communicator().world();
    const auto [wanted_in, wanted_out] = wanted_elems(operation, in, out);
    if ((in == nullptr || in->count() == wanted_in) &&
        (out == nullptr || out->count() == wanted_out)) {
      return;
    }
    const auto told = [](const ArrayView* array) {
      return array == nullptr ? std::string("none") : str(array->count());
    };
    throw usage_error(name(operation.collective), " over ", world, " ranks: input has ", told(in),
                      " elements and output ", told(out),
                      operation.counts.empty()
                          ? std::string()
                          : str(", but counts ask for ", wanted_in, " and ", wanted_out));
  }

  /// Elements that input and output have to have. Sets the operation's count: of a block, what the
  /// smaller one of the arrays has.
  std::pair<size_t, size_t> wanted_elems(Operation& operation, const ArrayView* in,
                                         const ArrayView* out) const {
    const Collective collective = operation.collective;
    const size_t world = communicator().world();
    const bool gathers = collective == Collective::kAllGather || collective == Collective::kGather;
    const bool scatters =
        collective == Collective::kReduceScatter || collective == Collective::kScatter;
    const bool pairs = collective == Collective::kAllToAll;
    const bool equal = operation.counts.empty() || operation.counts.size() != world;
    const ArrayView& smaller = scatters && out != nullptr ? *out : in != nullptr ? *in : *out;
    operation.count = smaller.count() / (pairs ? world : 1);
    const size_t block = equal ? operation.count : operation.counts[communicator().rank()];
    const size_t all = equal ? operation.count * world : sum(operation.counts);
    if (pairs) return {all, equal ? all : sum(operation.recv_counts)};
    return {scatters ? all : block, gathers ? all : block};
  }

  static size_t sum(const std::vector<size_t>& counts) {
    size_t total = 0;
    for (const size_t count : counts) total += count;
    return total;
  }

  std::shared_ptr<Shared> shared_ = std::make_shared<Shared>();
  int device_ = 0;  // the open one; taken for that of arrays that do not tell theirs
  uint64_t last_ticket_ = 0;
};

py::dict stats(PyCommunicator& self) { return stats_dict(self.communicator().stats()); }

std::unique_ptr<PyCommunicator> make(int rank, int world, py::object store, const std::string& name,
                                     const std::optional<std::string>& wire,
                                     const std::optional<std::string>& algorithm,
                                     const std::optional<std::string>& wire_links,
                                     const std::optional<std::string>& transport,
                                     const std::optional<double>& timeout) {
  CommunicatorOptions options = CommunicatorOptions::from_environment();
  options.name = name;
  if (wire) options.wire = wire_by_name(*wire);
  if (algorithm) options.algorithm = *algorithm;
  if (wire_links) {
    if (*wire_links != "network" && *wire_links != "all") {
      throw usage_error("wire_links '", *wire_links, "' is neither network nor all");
    }
    options.wire_on_all_links = *wire_links == "all";
  }
  if (transport) options.transport = *transport;
  if (timeout) options.timeout = milliseconds_of(timeout);
  return std::make_unique<PyCommunicator>(rank, world, std::move(store), options);
}

py::list environment_list() {
  py::list list;
  for (const VariableInfo& variable : environment_table()) {
    list.append(py::make_tuple(variable.name, variable.fallback, variable.help));
  }
  return list;
}

}  // namespace

const std::shared_ptr<Shared>* shared_of(PyObject* core) {
  static const auto* type = reinterpret_cast<PyTypeObject*>(py::type::of<PyCommunicator>().ptr());
  if (Py_TYPE(core) != type) return nullptr;
  auto* const instance = reinterpret_cast<py::detail::instance*>(core);
  const auto* self = instance->get_value_and_holder().value_ptr<PyCommunicator>();
  return self == nullptr ? nullptr : &self->shared();
}

void bind_communicator(py::module_& module) {
  py::class_<PyWork>(module, "Work", "The handle of an asynchronous collective.")
      .def("done", &PyWork::done)
      .def("wait", &PyWork::wait, py::arg("timeout") = py::none(), py::arg("stream") = py::none())
      .def("synchronize", &PyWork::synchronize, py::arg("timeout") = py::none())
      .def("source", &PyWork::source);

  py::class_<Settings>(module, "Settings", "What one call may choose for itself.")
      .def(py::init([](std::optional<std::string> wire, std::optional<std::string> algorithm,
                       std::optional<double> timeout, bool async_op, uintptr_t stream) {
             return Settings{std::move(wire), std::move(algorithm), timeout, async_op, stream};
           }),
           py::arg("wire") = py::none(), py::arg("algorithm") = py::none(),
           py::arg("timeout") = py::none(), py::arg("async_op") = false, py::arg("stream") = 0);

  const auto collective = [](Collective which) {
    return [which](PyCommunicator& self, py::object input, py::object output, const std::string& op,
                   double factor, int root, const Settings& settings, std::vector<size_t> counts,
                   std::vector<size_t> recv_counts) {
      return self.run(which, std::move(input), std::move(output), op, factor, root, settings,
                      Counts{std::move(counts), std::move(recv_counts)});
    };
  };
  const auto choice = [](const PyCommunicator& self, const std::string& collective, size_t count,
                         const std::string& dtype, const std::string& op,
                         const Settings& settings) {
    return self.choice(collective, count, dtype, op, settings);
  };
  py::class_<PyCommunicator> communicator(module, "Communicator");
  communicator
      .def(py::init(&make), py::arg("rank"), py::arg("world_size"), py::arg("store"),
           py::arg("name"), py::arg("wire") = py::none(), py::arg("algorithm") = py::none(),
           py::arg("wire_links") = py::none(), py::arg("transport") = py::none(),
           py::arg("timeout") = py::none())
      .def_property_readonly("rank", &PyCommunicator::rank)
      .def_property_readonly("world_size", &PyCommunicator::world)
      .def("barrier", &PyCommunicator::barrier, py::arg("timeout") = py::none())
      .def(
          "send",
          [](PyCommunicator& self, py::object array, int peer, int64_t tag,
             const Settings& settings) {
            return self.message(true, std::move(array), peer, tag, settings);
          },
          py::arg("array"), py::arg("peer"), py::arg("tag") = 0, py::arg("settings") = Settings())
      .def(
          "recv",
          [](PyCommunicator& self, py::object array, std::optional<int> peer, int64_t tag,
             const Settings& settings) {
            if (peer && *peer < 0) throw usage_error("recv: peer ", *peer, " is not a rank");
            return self.message(false, std::move(array), peer, tag, settings);
          },
          py::arg("array"), py::arg("peer") = py::none(), py::arg("tag") = 0,
          py::arg("settings") = Settings())
      .def("synchronize", &PyCommunicator::synchronize, py::arg("timeout") = py::none())
      .def("stats", &stats)
      .def("geometry", &PyCommunicator::geometry, py::arg("lane"))
      .def("choice", choice, py::arg("collective"), py::arg("count"), py::arg("dtype"),
           py::arg("op") = "sum", py::arg("settings") = Settings())
      .def("abort",
           [](PyCommunicator& self, const std::string& text) { self.communicator().abort(text); })
      .def("close", &PyCommunicator::close);
  for (const Collective which :
       {Collective::kAllReduce, Collective::kBroadcast, Collective::kReduce, Collective::kAllGather,
        Collective::kReduceScatter, Collective::kGather, Collective::kScatter,
        Collective::kAllToAll}) {
    communicator.def(name(which), collective(which), py::arg("input"), py::arg("output"),
                     py::arg("op") = "sum", py::arg("factor") = 1.0, py::arg("root") = 0,
                     py::arg("settings") = Settings(), py::arg("counts") = std::vector<size_t>(),
                     py::arg("recv_counts") = std::vector<size_t>());
  }
  module.def("environment", &environment_list, "Every DPCOMM_* variable as (name, default, help).");
  module.def("transports", &transport_names);
}

}  // namespace dpcomm
