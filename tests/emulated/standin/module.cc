// The extension module of the stand-in: importing it makes the device known to torch.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/DeviceGuard.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <chrono>
#include <cstring>
#include <thread>

#include "device.h"

namespace standin {
namespace {

namespace py = pybind11;

const c10::impl::DeviceGuardImplInterface& guard() { return *c10::impl::getDeviceGuardImpl(kType); }

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return guard().deviceCount() > 0; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return guard().deviceCount(); }
  void setCurrentDevice(c10::DeviceIndex device) const override {
    guard().setDevice({kType, device});
  }
  c10::DeviceIndex getCurrentDevice() const override { return guard().getDevice().index(); }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex device) const override {
    return guard().exchangeDevice({kType, device}).index();
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex device) const override {
    return exchangeDevice(device);
  }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    return at::detail::getDefaultCPUGenerator();
  }
  at::Generator getNewGenerator(c10::DeviceIndex) const override {
    return at::detail::createCPUGenerator();
  }
  at::Device getDeviceFromPtr(void*) const override { return guard().getDevice(); }
  at::Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    const c10::DeviceGuard on(storage.device());
    c10::DataPtr data = allocator().allocate(bytes);
    synchronize();
    const size_t kept = std::min(bytes, storage.nbytes());
    if (kept > 0) std::memcpy(data.get(), storage.data(), kept);
    storage.set_data_ptr_noswap(std::move(data));
    storage.set_nbytes(bytes);
  }
};

void sleep_ms(int64_t milliseconds) {
  enqueue([=] { std::this_thread::sleep_for(std::chrono::milliseconds(milliseconds)); });
}

cudaStream_t current() { return native(current_stream(guard().getDevice().index())); }

void begin_capture() { STANDIN_CHECK(cudaStreamBeginCapture(current(), kCaptureGlobal)); }

/// The executable graph, which lives as long as the process.
uintptr_t end_capture() {
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  STANDIN_CHECK(cudaStreamEndCapture(current(), &graph));
  STANDIN_CHECK(cudaGraphInstantiate(&executable, graph, 0));
  STANDIN_CHECK(cudaGraphDestroy(graph));
  return reinterpret_cast<uintptr_t>(executable);
}

void replay(uintptr_t executable) {
  STANDIN_CHECK(cudaGraphLaunch(reinterpret_cast<cudaGraphExec_t>(executable), current()));
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.doc() = "A stand-in device for torch (PrivateUse1): host memory, streams of a runtime.";
  c10::SetAllocator(kType, &allocator());
  at::RegisterPrivateUse1HooksInterface(new Hooks);
  module.def("device_count", [] { return static_cast<int>(guard().deviceCount()); });
  module.def("current_device", [] { return static_cast<int>(guard().getDevice().index()); });
  module.def("set_device",
             [](int device) { guard().setDevice({kType, static_cast<c10::DeviceIndex>(device)}); });
  module.def(
      "synchronize", [] { guard().synchronizeDevice(guard().getDevice().index()); },
      py::call_guard<py::gil_scoped_release>());
  module.def("sleep_ms", &sleep_ms, py::arg("milliseconds"),
             "Lets the current stream sleep; returns at once.");
  module.def("begin_capture", &begin_capture,
             "Lets the current stream, which may not be the default one, capture a graph.");
  module.def("end_capture", &end_capture, "Returns the graph, for replay().");
  module.def("replay", &replay, py::arg("graph"));
  module.def(
      "recorded_streams",
      [](const at::Tensor& tensor) { return recorded_streams(tensor.storage().data()); },
      "Ids of the streams that were recorded for the memory of a tensor.");
  module.def(
      "freed_blocks",
      [] {
        const FreedBlocks blocks = freed_blocks();
        return py::make_tuple(blocks.waiting, blocks.poisoned);
      },
      "(blocks that were freed and wait for their streams, blocks that were overwritten)");
}

}  // namespace standin
