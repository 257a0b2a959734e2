#include "base/error.h"
#include "cuda/plugin_parts.h"
#include "cuda/runtime.h"

namespace dpcomm {

std::unique_ptr<DeviceEngine> make_cuda_engine(const DeviceSetup& setup) {
  require_device(setup.device);
  throw internal_error("operations on CUDA devices are not there yet");
}

std::unique_ptr<VirtualGroup> make_cuda_group(const DeviceSetup& setup) {
  require_device(setup.device);
  throw internal_error("operations on CUDA devices are not there yet");
}

}  // namespace dpcomm
