#include "torch/process_group.h"

#include <ATen/record_function.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <mutex>
#include <set>
#include <utility>

#include "base/fork.h"
#include "torch/device_work.h"
#include "torch/profile.h"
#include "torch/python_hooks.h"
#include "torch/store_bootstrap.h"
#include "torch/work.h"

namespace dpcomm {
namespace {

/// The groups of this process, for shutdown_all(). Never destroyed.
struct Registry {
  std::mutex mutex;
  std::set<ProcessGroupDpcomm*> groups;
};

Registry& registry() {
  static Registry* current = new Registry;
  static uint32_t generation = fork_generation();
  if (generation != fork_generation()) {  // a forked child has one thread, and no group
    current = new Registry;               // the old one may be locked
    generation = fork_generation();
  }
  return *current;
}

}  // namespace

PythonHooks& python_hooks() {
  static PythonHooks hooks;
  return hooks;
}

std::exception_ptr translated(std::exception_ptr error) {
  return error && python_hooks().translate ? python_hooks().translate(error) : error;
}

void throw_translated(const Error& error) {
  std::rethrow_exception(translated(std::make_exception_ptr(error)));
}

void without_gil(const std::function<void()>& body) {
  python_hooks().without_gil != nullptr ? python_hooks().without_gil(body) : body();
}

ProcessGroupDpcomm::ProcessGroupDpcomm(const c10::intrusive_ptr<c10d::Store>& store, int rank,
                                       int size, const std::string& group_name,
                                       CommunicatorOptions options)
    : Backend(rank, size), group_name_(group_name), store_(store) {
  translating([&] {
    options.name = agree_on_name(*store, rank, size, group_name, options.timeout);
    StoreBootstrap bootstrap(store, store_prefix(options.name));
    communicator_ = Communicator::create(rank, size, bootstrap, options);
  });
  timeout_ = options.timeout.count();
  const std::lock_guard<std::mutex> lock(registry().mutex);
  registry().groups.insert(this);
}

ProcessGroupDpcomm::~ProcessGroupDpcomm() {
  {
    const std::lock_guard<std::mutex> lock(registry().mutex);
    registry().groups.erase(this);
  }
  without_gil([this] {
    communicator_->close();
    communicator_.reset();
  });
}

void ProcessGroupDpcomm::setTimeout(std::chrono::milliseconds timeout) {
  timeout_ = timeout.count();
  communicator_->set_timeout(timeout);
}

void ProcessGroupDpcomm::abort() { communicator_->abort(str("rank ", rank_, " called abort()")); }

void ProcessGroupDpcomm::shutdown() {
  without_gil([this] { communicator_->close(); });
  const std::lock_guard<std::mutex> lock(store_mutex_);
  store_.reset();
}

void ProcessGroupDpcomm::shutdown_all() {
  std::vector<std::shared_ptr<Communicator>> open;
  {
    const std::lock_guard<std::mutex> lock(registry().mutex);
    for (ProcessGroupDpcomm* group : registry().groups) open.push_back(group->communicator_);
  }
  for (const auto& communicator : open) communicator->close();
}

ProcessGroupDpcomm::WorkPointer ProcessGroupDpcomm::start_call(
    c10d::OpType type, const char* title, bool async, std::chrono::milliseconds timeout,
    c10::function_ref<void(Call&)> build) {
  try {
    Call call({rank_, size_}, type, title, async, timeout);
    build(call);
    const uint64_t sequence = (call.message() ? messages_ : sequence_).fetch_add(1) + 1;
    WorkPointer work = with_profile(
        *this, call, sequence, communicator_->options().global_ranks, [&]() -> WorkPointer {
          if (!call.device().is_cpu()) return start_on_device(std::move(call), sequence);
          if (call.async()) {
            return TorchWork::launch(*communicator_, completions_, std::move(call), sequence);
          }
          run_here(call, sequence);
          return nullptr;
        });
    if (work != nullptr && window_open_.load()) add_to_window(work);
    return work;
  } catch (const OwnUsageError& error) {
    refuse(error);
  } catch (const Error& error) {
    throw_translated(error);
  }
}

void ProcessGroupDpcomm::refuse(const OwnUsageError& reason) {
  try {
    communicator_->refuse(reason.collective, reason.what());
  } catch (const Error& error) {
    throw_translated(error);
  }
}

void ProcessGroupDpcomm::run_here(Call& call, uint64_t sequence) {
  RECORD_FUNCTION(call.title(), std::vector<c10::IValue>());
  Completions::Here here(*completions_);
  for (Operation& operation : call.operations()) {
    operation.interrupted = python_hooks().interrupted;
    communicator_->run(operation);
  }
  call.finish();
  here.succeeded(call.type(), sequence);
}

ProcessGroupDpcomm::WorkPointer ProcessGroupDpcomm::start_on_device(Call&& call,
                                                                    uint64_t sequence) {
  if (completions_->has_hook()) {
    throw usage_error(call.title(),
                      ": the group has a completion hook, and dpcomm calls those for ",
                      "tensors on the CPU only");
  }
  const c10::Stream stream = device_stream(call.device());
  RECORD_FUNCTION(call.title(), std::vector<c10::IValue>());
  if (call.async()) return DeviceWork::launch(communicator_, stream, std::move(call), sequence);
  DeviceEnd::launch(*communicator_, stream, call).join(*communicator_);
  return nullptr;
}

c10::Stream ProcessGroupDpcomm::device_stream(c10::Device device) {
  const std::lock_guard<std::mutex> lock(device_mutex_);
  if (device_stream_ && device_stream_->device() == device) return *device_stream_;
  if (device_stream_) {
    throw usage_error("a tensor is on ", device.str(), ", but this group works on ",
                      device_stream_->device().str(), ": one device for each rank");
  }
  const c10::impl::VirtualGuardImpl guard(device.type());
  const c10::Stream stream = guard.getStreamFromGlobalPool(device, /*isHighPriority=*/true);
  communicator_->open_device(device.index(), stream.native_handle());
  device_stream_ = stream;
  return stream;
}

void ProcessGroupDpcomm::eagerConnectSingleDevice(at::Device device) {
  translating([&] { device_stream(device); });
}

void ProcessGroupDpcomm::synchronize_device() {
  std::optional<c10::Stream> stream;
  {
    const std::lock_guard<std::mutex> lock(device_mutex_);
    stream = device_stream_;
  }
  if (!stream) return;
  const c10::impl::VirtualGuardImpl guard(stream->device_type());
  guard.synchronizeStream(guard.getStream(stream->device()));
  guard.synchronizeStream(*stream);
}

}  // namespace dpcomm
