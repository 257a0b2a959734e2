// The kernels of the library, for the host. No CUDA header.
#pragma once

#include "cuda/launch_plan.h"

namespace dpcomm {

/// What cudaLaunchKernel takes for a kernel: `__global__ void (KernelArgs)`. By schedule: blocks of
/// a multiple of 32 threads, at most kMaxThreads, LaunchPlan::blocks_x of them. By packets: at most
/// kPacketThreads. Null where there is no such kernel.
const void* kernel_symbol(const KernelId& kernel);

}  // namespace dpcomm
