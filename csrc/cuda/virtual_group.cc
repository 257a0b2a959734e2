// Several ranks on one device: gridDim.y of one cooperative launch.
#include <memory>
#include <mutex>

#include "cuda/plugin_parts.h"
#include "cuda/rank_memory.h"

namespace dpcomm {
namespace {

class CudaGroup final : public VirtualGroup {
 public:
  explicit CudaGroup(const DeviceSetup& setup)
      : device_(setup.device),
        layout_(choose_geometry(setup.world, setup.max_ctas, setup.staging_bytes)) {
    const int world = setup.world;
    const DeviceGuard device(device_);
    states_ = std::make_unique<DeviceMemory>(world * sizeof(RankState), "states of ranks");
    std::vector<char*> bases;
    for (int rank = 0; rank < world; ++rank) {
      ranks_.push_back(std::make_unique<RankMemory>(rank, layout_));
      bases.push_back(ranks_.back()->staging());
    }
    std::vector<RankState> states;
    for (const auto& rank : ranks_) states.push_back(rank->connect(layout_, bases));
    copy_to_device(states_->get(), states.data(), world * sizeof(RankState),
                   "writing states of ranks");
  }

  ~CudaGroup() override {
    abort();
    try {
      const DeviceGuard device(device_);
      cudaDeviceSynchronize();  // kernels leave now
      ranks_.clear();
      states_.reset();
    } catch (const Error&) {  // the device is lost
    }
  }

  const StagingGeometry& geometry() const override { return layout_.geometry(); }
  size_t staging_bytes() const override { return layout_.bytes() * ranks_.size(); }

  void launch(const OpRecord& record, uint32_t tag, const std::vector<const void*>& input,
              const std::vector<void*>& output, void* stream) override {
    const size_t bytes = record.count * size_bytes(static_cast<Dtype>(record.dtype));
    LaunchPlan plan =
        plan_launch(record, tag, layout_.geometry(), choose_ctas(bytes, layout_.geometry().ctas));
    const size_t world = ranks_.size();
    if (input.size() != world || output.size() != world) {
      throw usage_error(input.size(), " inputs and ", output.size(), " outputs for ", world,
                        " ranks");
    }
    plan.args.ranks = reinterpret_cast<const RankState*>(states_->get());
    for (size_t rank = 0; rank < world; ++rank) {
      plan.args.input[rank] = input[rank];
      plan.args.output[rank] = output[rank];
    }
    const DeviceGuard device(device_);
    launch_kernel(plan, static_cast<int>(world), stream);
  }

  void abort() override {
    for (const auto& rank : ranks_) rank->words().abort();
  }

  std::vector<WaitRecord> waits() const override {
    std::vector<WaitRecord> all;
    for (const auto& rank : ranks_) {
      for (const WaitRecord& record : rank->words().waits()) all.push_back(record);
    }
    return all;
  }

 private:
  const int device_;
  const StagingLayout layout_;
  std::unique_ptr<DeviceMemory> states_;
  std::vector<std::unique_ptr<RankMemory>> ranks_;
};

}  // namespace

std::unique_ptr<VirtualGroup> make_cuda_group(const DeviceSetup& setup) {
  require_device(setup.device);
  if (setup.world > kMaxVirtualRanks) {
    throw usage_error("a virtual group has 1 to ", kMaxVirtualRanks, " ranks, not ", setup.world);
  }
  return std::make_unique<CudaGroup>(setup);
}

}  // namespace dpcomm
