// One rank's side of a device.
//
//   caller    ... work ... --ready--\                 /--join--> ... uses the result ...
//   stream                           \-- kernel --done
//
// Streams are ordered by events alone; the host waits for nothing. A kernel is launched
// cooperatively: its blocks wait for those of other ranks, so all of them have to be on the device
// at a time.
#include <cstring>
#include <memory>
#include <mutex>
#include <thread>

#include "base/log.h"
#include "cuda/kernels.h"
#include "cuda/peer_memory.h"
#include "cuda/plugin_parts.h"
#include "cuda/rank_memory.h"
#include "cuda/tickets.h"

namespace dpcomm {
namespace {

cudaStream_t make_stream() {
  int least = 0, greatest = 0;
  check_cuda(cudaDeviceGetStreamPriorityRange(&least, &greatest), "priorities of streams");
  cudaStream_t stream = nullptr;
  check_cuda(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, greatest),
             "a stream for communication");
  return stream;
}

StagingLayout layout_for(const DeviceSetup& setup) {
  return StagingLayout(choose_geometry(setup.world, setup.max_ctas, setup.staging_bytes));
}

class CudaEngine final : public DeviceEngine {
 public:
  explicit CudaEngine(const DeviceSetup& setup)
      : rank_(setup.rank),
        world_(setup.world),
        device_(setup.device),
        layout_(layout_for(setup)),
        stream_(static_cast<cudaStream_t>(setup.stream)) {
    const DeviceGuard device(device_);
    const CaptureGuard capture;
    parts_ = std::make_unique<Parts>(rank_, device_, layout_);
    if (stream_ == nullptr) {
      stream_ = make_stream();
      owns_stream_ = true;
    }
  }

  ~CudaEngine() override {
    try {
      const DeviceGuard device(device_);
      const CaptureGuard capture;
      abort();
      if (!complete(parts_->tickets.last())) {
        log_line(LogLevel::kWarn, str("CUDA device ", device_, " of rank ", rank_,
                                      " is still busy: its staging is not freed"));
        parts_.release();
        return;
      }
      parts_.reset();
      if (owns_stream_) cudaStreamDestroy(stream_);
    } catch (const Error& error) {  // the device is lost, and its memory with it
      log_line(LogLevel::kWarn, error.what());
      parts_.release();
    }
  }

  DeviceHandle handle() const override {
    const DeviceGuard device(device_);
    return export_memory(rank_, device_, parts_->memory.staging());
  }

  void connect(const std::vector<DeviceHandle>& handles) override {
    if (static_cast<int>(handles.size()) != world_) {
      throw internal_error(handles.size(), " handles for ", world_, " ranks");
    }
    const DeviceGuard device(device_);
    const CaptureGuard capture;
    const RankState state = parts_->memory.connect(layout_, parts_->peers.open(handles));
    copy_to_device(parts_->state.get(), &state, sizeof(state), "writing the state of a rank");
    connected_ = true;
  }

  void disconnect() override {
    const std::lock_guard lock(launching_);
    connected_ = false;
    const DeviceGuard device(device_);
    const CaptureGuard capture;
    if (parts_->tickets.captured_any()) check_cuda(cudaDeviceSynchronize(), "the end of graphs");
    parts_->peers.close();
  }

  void adopt_thread() override { check_cuda(cudaSetDevice(device_), "CUDA device ", device_); }

  void* stream() const override { return stream_; }
  const StagingGeometry& geometry() const override { return layout_.geometry(); }
  size_t staging_bytes() const override { return layout_.bytes(); }

  uint64_t launch(const DeviceTask& task, void* caller_stream) override {
    const auto caller = static_cast<cudaStream_t>(caller_stream);
    const size_t bytes = task.record.count * size_bytes(static_cast<Dtype>(task.record.dtype));
    LaunchPlan plan = plan_launch(task.record, task.tag, layout_.geometry(),
                                  choose_ctas(bytes, layout_.geometry().ctas));
    require_kernel(plan.kernel);
    const std::lock_guard lock(launching_);
    if (!connected_) throw internal_error("rank ", rank_, " is not connected to its peers");
    const DeviceGuard device(device_);
    const CaptureGuard guard;
    Ticket ticket;
    ticket.number = parts_->tickets.next();
    cudaStreamCaptureStatus status{};
    unsigned long long capture = 0;
    check_cuda(cudaStreamGetCaptureInfo(caller, &status, &capture), "the caller's stream");
    if (status == cudaStreamCaptureStatusActive) ticket.capture = capture;
    bool launched = false;
    try {
      ticket.done = parts_->tickets.event();
      if (caller != stream_) {
        ticket.ready = parts_->tickets.event();
        check_cuda(cudaEventRecord(ticket.ready, caller), "marking the caller's stream");
        check_cuda(cudaStreamWaitEvent(stream_, ticket.ready, 0),
                   "waiting for the caller's stream");
      }
      plan.args.ranks = reinterpret_cast<const RankState*>(parts_->state.get());
      plan.args.input[0] = task.input;
      plan.args.output[0] = task.output;
      run(plan, task, bytes);
      launched = true;
      check_cuda(cudaEventRecord(ticket.done, stream_), "marking an operation's end");
    } catch (...) {
      if (launched) parts_->tickets.lose();
      parts_->tickets.give_back(ticket.ready);
      parts_->tickets.give_back(ticket.done);
      throw;
    }
    parts_->tickets.add(ticket);
    return ticket.number;
  }

  void join(uint64_t ticket, void* caller) override {
    if (caller == stream_ && stream_ != nullptr) return;
    const DeviceGuard device(device_);
    const CaptureGuard capture;
    parts_->tickets.join(ticket, static_cast<cudaStream_t>(caller));
  }

  Progress progress(uint64_t ticket) override {
    const DeviceGuard device(device_);
    const CaptureGuard capture;
    return parts_->tickets.progress(ticket);
  }

  void synchronize() override {
    const uint64_t last = parts_->tickets.last();
    while (!complete(last)) std::this_thread::sleep_for(std::chrono::microseconds(50));
  }

  void abort() override { parts_->memory.words().abort(); }
  bool aborted() const override { return parts_->memory.words().aborted(); }
  std::vector<WaitRecord> waits() const override { return parts_->memory.words().waits(); }

 private:
  /// What lies on the device.
  struct Parts {
    Parts(int rank, int device, const StagingLayout& layout)
        : memory(rank, layout),
          state(sizeof(RankState), "state of a rank"),
          peers(rank, device, memory.staging()) {}
    RankMemory memory;
    DeviceMemory state;
    PeerMemory peers;
    Tickets tickets;
  };

  void run(const LaunchPlan& plan, const DeviceTask& task, size_t bytes) {
    const auto op = static_cast<ReduceOp>(task.record.op);
    const auto collective = static_cast<Collective>(task.record.collective);
    if (world_ == 1 && !(reduces(collective) && op == ReduceOp::kPremulSum)) {
      if (task.input == nullptr || task.output == nullptr || task.input == task.output) return;
      check_cuda(cudaMemcpyAsync(task.output, task.input, bytes, cudaMemcpyDeviceToDevice, stream_),
                 "copying");
      return;
    }
    launch_kernel(plan, 1, stream_);
  }

  const int rank_;
  const int world_;
  const int device_;
  const StagingLayout layout_;
  cudaStream_t stream_;
  bool owns_stream_ = false;
  std::unique_ptr<Parts> parts_;
  std::mutex launching_;  // guards what follows, and the order of the stream
  bool connected_ = false;
};

}  // namespace

const void* require_kernel(const KernelId& kernel) {
  const void* const symbol = kernel_symbol(kernel);
  if (symbol == nullptr) throw usage_error("this build has no kernel ", kernel_name(kernel));
  return symbol;
}

void launch_kernel(const LaunchPlan& plan, int ranks, void* stream) {
  const void* const kernel = require_kernel(plan.kernel);
  const int threads = block_threads(plan.kernel);
  void* arguments[] = {const_cast<KernelArgs*>(&plan.args)};
  check_cuda(cudaLaunchCooperativeKernel(kernel, dim3(plan.blocks_x, ranks), dim3(threads),
                                         arguments, 0, static_cast<cudaStream_t>(stream)),
             "launching kernel ", kernel_name(plan.kernel), " with ", plan.blocks_x, " x ", ranks,
             " blocks of ", threads, " threads");
}

std::unique_ptr<DeviceEngine> make_cuda_engine(const DeviceSetup& setup) {
  require_device(setup.device);
  return std::make_unique<CudaEngine>(setup);
}

}  // namespace dpcomm
