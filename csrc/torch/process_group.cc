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

void without_gil(const std::function<void()>& body) {
  python_hooks().without_gil != nullptr ? python_hooks().without_gil(body) : body();
}

/// Runs `body`, with dpcomm's errors translated for Python.
template <class Body>
auto translating(Body&& body) {
  try {
    return body();
  } catch (const Error& error) {
    throw_translated(error);
  }
}

const at::Tensor& single(const std::vector<at::Tensor>& tensors, const char* what) {
  if (tensors.size() != 1) {
    throw usage_error(what, " takes a list of one tensor, not of ", tensors.size());
  }
  return tensors[0];
}

template <class Lists>
void require_pairs(const Lists& outputs, const std::vector<at::Tensor>& inputs, const char* what) {
  if (outputs.size() != inputs.size()) {
    throw usage_error(what, ": ", outputs.size(), " outputs for ", inputs.size(), " inputs");
  }
}

[[noreturn]] void unsupported(const char* what) {
  throw_translated(
      usage_error("backend dpcomm does not support ", what, " yet; a group of backend gloo does"));
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

ProcessGroupDpcomm::ProcessGroupDpcomm(const c10::intrusive_ptr<c10d::Store>& store, int rank,
                                       int size, const std::string& group_name,
                                       CommunicatorOptions options)
    : Backend(rank, size) {
  translating([&] {
    options.name = agree_on_name(*store, rank, size, group_name, options.timeout);
    StoreBootstrap bootstrap(store, store_prefix(options.name));
    communicator_ = Communicator::create(rank, size, bootstrap, options);
  });
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
  communicator_->set_timeout(timeout);
}

void ProcessGroupDpcomm::abort() { communicator_->abort(str("rank ", rank_, " called abort()")); }

void ProcessGroupDpcomm::shutdown() {
  without_gil([this] { communicator_->close(); });
}

void ProcessGroupDpcomm::shutdown_all() {
  std::vector<std::shared_ptr<Communicator>> open;
  {
    const std::lock_guard<std::mutex> lock(registry().mutex);
    for (ProcessGroupDpcomm* group : registry().groups) open.push_back(group->communicator_);
  }
  for (const auto& communicator : open) communicator->close();
}

template <class Opts, class Build>
ProcessGroupDpcomm::WorkPointer ProcessGroupDpcomm::start(c10d::OpType type, const char* title,
                                                          const Opts& opts, Build&& build) {
  try {
    Call call({rank_, size_}, type, title, opts.asyncOp, opts.timeout);
    build(call);
    const uint64_t sequence = sequence_.fetch_add(1) + 1;
    return with_profile(*this, call, sequence, communicator_->options().global_ranks,
                        [&]() -> WorkPointer {
                          if (!call.device().is_cpu())
                            return start_on_device(std::move(call), sequence);
                          if (call.async())
                            return TorchWork::launch(*communicator_, std::move(call), sequence);
                          run_here(call);
                          return nullptr;
                        });
  } catch (const Error& error) {
    throw_translated(error);
  }
}

void ProcessGroupDpcomm::run_here(Call& call) {
  RECORD_FUNCTION(call.title(), std::vector<c10::IValue>());
  for (Operation& operation : call.operations()) {
    if (python_hooks().interrupted != nullptr) operation.interrupted = python_hooks().interrupted;
    communicator_->run(operation);
  }
  call.finish();
}

ProcessGroupDpcomm::WorkPointer ProcessGroupDpcomm::start_on_device(Call&& call,
                                                                    uint64_t sequence) {
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

ProcessGroupDpcomm::WorkPointer ProcessGroupDpcomm::allreduce(Tensors& tensors,
                                                              const c10d::AllreduceOptions& opts) {
  return start(c10d::OpType::ALLREDUCE, "dpcomm:all_reduce", opts,
               [&](Call& call) { call.all_reduce(single(tensors, "all_reduce"), opts.reduceOp); });
}

ProcessGroupDpcomm::WorkPointer ProcessGroupDpcomm::allreduce_coalesced(
    Tensors& tensors, const c10d::AllreduceCoalescedOptions& opts) {
  return start(c10d::OpType::ALLREDUCE_COALESCED, "dpcomm:all_reduce_coalesced", opts,
               [&](Call& call) {
                 for (const at::Tensor& tensor : tensors) call.all_reduce(tensor, opts.reduceOp);
               });
}

ProcessGroupDpcomm::WorkPointer ProcessGroupDpcomm::reduce(Tensors& tensors,
                                                           const c10d::ReduceOptions& opts) {
  return start(c10d::OpType::REDUCE, "dpcomm:reduce", opts, [&](Call& call) {
    call.reduce(single(tensors, "reduce"), opts.reduceOp, opts.rootRank);
  });
}

ProcessGroupDpcomm::WorkPointer ProcessGroupDpcomm::broadcast(Tensors& tensors,
                                                              const c10d::BroadcastOptions& opts) {
  return start(c10d::OpType::BROADCAST, "dpcomm:broadcast", opts,
               [&](Call& call) { call.broadcast(single(tensors, "broadcast"), opts.rootRank); });
}

ProcessGroupDpcomm::WorkPointer ProcessGroupDpcomm::allgather(std::vector<Tensors>& outputs,
                                                              Tensors& inputs,
                                                              const c10d::AllgatherOptions& opts) {
  return start(c10d::OpType::ALLGATHER, "dpcomm:all_gather", opts, [&](Call& call) {
    require_pairs(outputs, inputs, "all_gather");
    call.all_gather(outputs[0], single(inputs, "all_gather"));
  });
}

ProcessGroupDpcomm::WorkPointer ProcessGroupDpcomm::allgather_coalesced(
    std::vector<Tensors>& outputs, Tensors& inputs, const c10d::AllgatherOptions& opts) {
  return start(c10d::OpType::ALLGATHER_COALESCED, "dpcomm:all_gather_coalesced", opts,
               [&](Call& call) {
                 require_pairs(outputs, inputs, "all_gather_coalesced");
                 for (size_t i = 0; i < inputs.size(); ++i) call.all_gather(outputs[i], inputs[i]);
               });
}

ProcessGroupDpcomm::WorkPointer ProcessGroupDpcomm::_allgather_base(
    at::Tensor& output, at::Tensor& input, const c10d::AllgatherOptions& opts) {
  return start(c10d::OpType::_ALLGATHER_BASE, "dpcomm:all_gather_into_tensor", opts,
               [&](Call& call) { call.all_gather(output, input); });
}

ProcessGroupDpcomm::WorkPointer ProcessGroupDpcomm::allgather_into_tensor_coalesced(
    Tensors& outputs, Tensors& inputs, const c10d::AllgatherOptions& opts) {
  return start(c10d::OpType::COALESCED, "dpcomm:all_gather_into_tensor_coalesced", opts,
               [&](Call& call) {
                 require_pairs(outputs, inputs, "all_gather_into_tensor_coalesced");
                 for (size_t i = 0; i < inputs.size(); ++i) call.all_gather(outputs[i], inputs[i]);
               });
}

ProcessGroupDpcomm::WorkPointer ProcessGroupDpcomm::reduce_scatter(
    Tensors& outputs, std::vector<Tensors>& inputs, const c10d::ReduceScatterOptions& opts) {
  return start(c10d::OpType::REDUCE_SCATTER, "dpcomm:reduce_scatter", opts, [&](Call& call) {
    require_pairs(inputs, outputs, "reduce_scatter");
    call.reduce_scatter(single(outputs, "reduce_scatter"), inputs[0], opts.reduceOp);
  });
}

ProcessGroupDpcomm::WorkPointer ProcessGroupDpcomm::_reduce_scatter_base(
    at::Tensor& output, at::Tensor& input, const c10d::ReduceScatterOptions& opts) {
  return start(c10d::OpType::_REDUCE_SCATTER_BASE, "dpcomm:reduce_scatter_tensor", opts,
               [&](Call& call) { call.reduce_scatter(output, input, opts.reduceOp); });
}

ProcessGroupDpcomm::WorkPointer ProcessGroupDpcomm::reduce_scatter_tensor_coalesced(
    Tensors& outputs, Tensors& inputs, const c10d::ReduceScatterOptions& opts) {
  return start(c10d::OpType::REDUCE_SCATTER_TENSOR_COALESCED,
               "dpcomm:reduce_scatter_tensor_coalesced", opts, [&](Call& call) {
                 require_pairs(outputs, inputs, "reduce_scatter_tensor_coalesced");
                 for (size_t i = 0; i < inputs.size(); ++i) {
                   call.reduce_scatter(outputs[i], inputs[i], opts.reduceOp);
                 }
               });
}

ProcessGroupDpcomm::WorkPointer ProcessGroupDpcomm::barrier(const c10d::BarrierOptions& opts) {
  return start(c10d::OpType::BARRIER, "dpcomm:barrier", opts, [this](Call& call) {
    synchronize_device();
    call.barrier();
  });
}

ProcessGroupDpcomm::WorkPointer ProcessGroupDpcomm::allreduce_sparse(
    Tensors&, const c10d::AllreduceOptions&) {
  unsupported("all_reduce of sparse tensors");
}

ProcessGroupDpcomm::WorkPointer ProcessGroupDpcomm::gather(std::vector<Tensors>&, Tensors&,
                                                           const c10d::GatherOptions&) {
  unsupported("gather");
}

ProcessGroupDpcomm::WorkPointer ProcessGroupDpcomm::scatter(Tensors&, std::vector<Tensors>&,
                                                            const c10d::ScatterOptions&) {
  unsupported("scatter");
}

ProcessGroupDpcomm::WorkPointer ProcessGroupDpcomm::alltoall(Tensors&, Tensors&,
                                                             const c10d::AllToAllOptions&) {
  unsupported("all_to_all");
}

ProcessGroupDpcomm::WorkPointer ProcessGroupDpcomm::alltoall_base(at::Tensor&, at::Tensor&,
                                                                  std::vector<int64_t>&,
                                                                  std::vector<int64_t>&,
                                                                  const c10d::AllToAllOptions&) {
  unsupported("all_to_all_single");
}

ProcessGroupDpcomm::WorkPointer ProcessGroupDpcomm::send(Tensors&, int, int) {
  unsupported("send");
}

ProcessGroupDpcomm::WorkPointer ProcessGroupDpcomm::recv(Tensors&, int, int) {
  unsupported("recv");
}

ProcessGroupDpcomm::WorkPointer ProcessGroupDpcomm::recvAnysource(Tensors&, int) {
  unsupported("recv from any source");
}

void ProcessGroupDpcomm::monitoredBarrier(const c10d::BarrierOptions&, bool) {
  unsupported("monitored_barrier");
}

}  // namespace dpcomm
