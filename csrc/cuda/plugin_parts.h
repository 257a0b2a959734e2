// What the files of libdpcomm_cuda.so give each other.
#pragma once

#include <memory>

#include "cuda/engine.h"

namespace dpcomm {

std::unique_ptr<DeviceEngine> make_cuda_engine(const DeviceSetup& setup);  // engine.cc
std::unique_ptr<VirtualGroup> make_cuda_group(const DeviceSetup& setup);   // virtual_group.cc

}  // namespace dpcomm
