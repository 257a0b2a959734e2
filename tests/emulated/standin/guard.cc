// Devices, streams and events of the stand-in, as torch sees them.
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <array>
#include <memory>
#include <mutex>
#include <unordered_map>

#include "device.h"

namespace standin {
namespace {

constexpr int kPool = 4;  // streams of a priority in the pool of a device

/// Streams by id; 0 is the default stream. They live as long as the process.
struct Streams {
  std::mutex mutex;
  std::vector<cudaStream_t> handles{nullptr};
  std::array<int64_t, kPool> pools[2] = {};  // 0: not made yet
  unsigned next[2] = {};
};

Streams& streams(c10::DeviceIndex device) {
  static std::array<Streams, 16>* all = new std::array<Streams, 16>;
  return all->at(device);
}

std::unordered_map<int, int64_t>& current_ids() {
  thread_local std::unordered_map<int, int64_t> ids;
  return ids;
}

c10::Device current_device() {
  int device = 0;
  STANDIN_CHECK(cudaGetDevice(&device));
  return c10::Device(kType, static_cast<c10::DeviceIndex>(device));
}

/// Sets the device for its lifetime, if it is another one.
class OnDevice {
 public:
  explicit OnDevice(c10::DeviceIndex device) : before_(current_device().index()) {
    if (device != before_) STANDIN_CHECK(cudaSetDevice(device));
    changed_ = device != before_;
  }
  ~OnDevice() {
    if (changed_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_;
  bool changed_;
};

int64_t make_stream(Streams& of_device, int priority) {
  cudaStream_t made = nullptr;
  STANDIN_CHECK(cudaStreamCreateWithPriority(&made, kStreamNonBlocking, priority));
  of_device.handles.push_back(made);
  return static_cast<int64_t>(of_device.handles.size()) - 1;
}

c10::Device with_index(c10::Device device) {
  return device.has_index() ? device : current_device();
}

c10::Stream stream_of(c10::Device device, int64_t id) {
  return c10::Stream(c10::Stream::UNSAFE, device, id);
}

cudaEvent_t event_of(void* event) { return static_cast<cudaEvent_t>(event); }

struct GuardImpl final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kType; }

  c10::Device exchangeDevice(c10::Device device) const override {
    const c10::Device before = current_device();
    if (device.has_index() && device != before) setDevice(device);
    return before;
  }
  c10::Device getDevice() const override { return current_device(); }
  void setDevice(c10::Device device) const override {
    TORCH_CHECK(device.type() == kType, "not a device of the stand-in: ", device);
    if (device.has_index()) STANDIN_CHECK(cudaSetDevice(device.index()));
  }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    if (device.has_index()) cudaSetDevice(device.index());
  }
  c10::DeviceIndex deviceCount() const noexcept override {
    int count = 0;
    if (cudaGetDeviceCount(&count) != 0) {
      cudaGetLastError();
      return 0;
    }
    return static_cast<c10::DeviceIndex>(count);
  }

  c10::Stream getStream(c10::Device device) const override {
    return current_stream(with_index(device).index());
  }
  c10::Stream getDefaultStream(c10::Device device) const override {
    return stream_of(with_index(device), 0);
  }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool high_priority) const override {
    device = with_index(device);
    const OnDevice on(device.index());
    Streams& all = streams(device.index());
    const std::lock_guard<std::mutex> lock(all.mutex);
    int64_t& id = all.pools[high_priority][all.next[high_priority]++ % kPool];
    if (id == 0) id = make_stream(all, high_priority ? -1 : 0);
    return stream_of(device, id);
  }
  c10::Stream getNewStream(c10::Device device, int priority) const override {
    device = with_index(device);
    const OnDevice on(device.index());
    Streams& all = streams(device.index());
    const std::lock_guard<std::mutex> lock(all.mutex);
    return stream_of(device, make_stream(all, priority));
  }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    const c10::Stream before = current_stream(stream.device_index());
    current_ids()[stream.device_index()] = stream.id();
    return before;
  }
  void* getStreamNativeHandle(const c10::Stream stream) const override { return native(stream); }
  bool queryStream(const c10::Stream& stream) const override {
    const OnDevice on(stream.device_index());
    const cudaError_t state = cudaStreamQuery(native(stream));
    if (state != kNotReady) check(state, "cudaStreamQuery");
    return state != kNotReady;
  }
  void synchronizeStream(const c10::Stream& stream) const override {
    const OnDevice on(stream.device_index());
    STANDIN_CHECK(cudaStreamSynchronize(native(stream)));
  }
  bool isStreamCapturing(const c10::Stream& stream) const override {
    const OnDevice on(stream.device_index());
    return is_capturing(native(stream));
  }
  void synchronizeDevice(const c10::DeviceIndex device) const override {
    const OnDevice on(device);
    STANDIN_CHECK(cudaDeviceSynchronize());
  }

  void record(void** event, const c10::Stream& stream, const c10::DeviceIndex device,
              const c10::EventFlag flag) const override {
    TORCH_CHECK(device == -1 || device == stream.device_index(), "event of device ",
                static_cast<int>(device), ", stream of device ",
                static_cast<int>(stream.device_index()));
    const OnDevice on(stream.device_index());
    if (*event == nullptr) {
      cudaEvent_t made = nullptr;
      const bool timed = flag == c10::EventFlag::BACKEND_DEFAULT;
      STANDIN_CHECK(cudaEventCreateWithFlags(&made, timed ? 0 : kEventDisableTiming));
      *event = made;
    }
    STANDIN_CHECK(cudaEventRecord(event_of(*event), native(stream)));
  }
  void block(void* event, const c10::Stream& stream) const override {
    if (event == nullptr) return;
    const OnDevice on(stream.device_index());
    STANDIN_CHECK(cudaStreamWaitEvent(native(stream), event_of(event), 0));
  }
  bool queryEvent(void* event) const override {
    if (event == nullptr) return true;
    const cudaError_t state = cudaEventQuery(event_of(event));
    if (state != kNotReady) check(state, "cudaEventQuery");
    return state != kNotReady;
  }
  void synchronizeEvent(void* event) const override {
    if (event != nullptr) STANDIN_CHECK(cudaEventSynchronize(event_of(event)));
  }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override {
    if (event != nullptr) cudaEventDestroy(event_of(event));
  }
  double elapsedTime(void* start, void* end, const c10::DeviceIndex) const override {
    float milliseconds = 0;
    STANDIN_CHECK(cudaEventElapsedTime(&milliseconds, event_of(start), event_of(end)));
    return milliseconds;
  }

  void recordDataPtrOnStream(const c10::DataPtr& data, const c10::Stream& stream) const override {
    record_stream(data, stream);
  }
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, GuardImpl)

/// What a stream runs: once, or as often as the graph that captured it.
struct Body {
  std::function<void()> function;
  bool captured;
};

void run_body(void* data) {
  auto* body = static_cast<Body*>(data);
  body->function();
  if (!body->captured) delete body;
}

}  // namespace

void check(cudaError_t error, const char* what) {
  if (error == 0) return;
  cudaGetLastError();
  TORCH_CHECK(false, what, ": ", cudaGetErrorString(error), " (", error, ")");
}

c10::Stream current_stream(c10::DeviceIndex device) {
  const auto found = current_ids().find(device);
  return stream_of(c10::Device(kType, device), found == current_ids().end() ? 0 : found->second);
}

cudaStream_t native(const c10::Stream& stream) {
  Streams& all = streams(stream.device_index());
  const std::lock_guard<std::mutex> lock(all.mutex);
  return all.handles.at(stream.id());
}

bool is_capturing(cudaStream_t stream) {
  int status = 0;
  STANDIN_CHECK(cudaStreamIsCapturing(stream, &status));
  return status != 0;
}

void enqueue(std::function<void()> function) {
  const cudaStream_t stream = native(current_stream(current_device().index()));
  auto body = std::make_unique<Body>(Body{std::move(function), is_capturing(stream)});
  STANDIN_CHECK(cudaLaunchHostFunc(stream, &run_body, body.get()));
  body.release();
}

void synchronize() {
  STANDIN_CHECK(cudaStreamSynchronize(native(current_stream(current_device().index()))));
}

}  // namespace standin
