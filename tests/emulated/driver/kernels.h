// The kernels that an executable was linked with: from the sources, or from PTX.
#pragma once

#include <string>

#include "cuda/kernel_args.h"

namespace dpcomm::emulated {

/// What one CUDA thread does.
using KernelBody = void (*)(const KernelArgs&);

/// Null where there is no kernel of that name (cuda/launch_plan.h, kernel_name).
KernelBody find_kernel(const std::string& name);

}  // namespace dpcomm::emulated
