// What the files of libdpcomm_cuda.so give each other.
#pragma once

#include <memory>

#include "cuda/engine.h"
#include "cuda/launch_plan.h"

namespace dpcomm {

std::unique_ptr<DeviceEngine> make_cuda_engine(const DeviceSetup& setup);  // engine.cc
std::unique_ptr<VirtualGroup> make_cuda_group(const DeviceSetup& setup);   // virtual_group.cc

/// The kernel's symbol; throws UsageError where this build has none.
const void* require_kernel(const KernelId& kernel);

/// Threads of a block.
constexpr int block_threads(const KernelId& kernel) {
  return kernel.packets ? kPacketThreads : kMaxThreads;
}

/// Launches the kernel of a plan, whose arguments are complete, on the current device with
/// gridDim.y = ranks; an error if its blocks do not fit the device at a time.
void launch_kernel(const LaunchPlan& plan, int ranks, void* stream);

}  // namespace dpcomm
