// What libdpcomm_cuda.so gives to the library that loads it.
#pragma once

#include <string>

#include "base/error.h"
#include "cuda/engine.h"

namespace dpcomm {

/// Functions as in engine.h. Both sides are compiled together (`build` says so), so classes and
/// exceptions may pass between them.
struct CudaPlugin {
  std::string build;
  int (*device_count)(std::string* why);
  int (*device_of)(const void* memory);
  int (*resident_ctas)(int device, int ranks, int wanted);
  std::unique_ptr<DeviceEngine> (*make_device_engine)(const DeviceSetup& setup);
  std::unique_ptr<VirtualGroup> (*make_virtual_group)(const DeviceSetup& setup);
};

/// Differs between builds whose classes may differ. The number counts changes of engine.h.
inline std::string plugin_build() {
  return str("3, ", sizeof(OpRecord), ", ", sizeof(DeviceSetup), ", ", sizeof(DeviceTask), ", ",
             sizeof(KernelArgs), ", ", sizeof(WaitRecord), ", ", __VERSION__);
}

/// The one symbol of the library.
inline constexpr const char* kCudaPluginSymbol = "dpcomm_cuda_plugin";
using CudaPluginFunction = const CudaPlugin* (*)();

}  // namespace dpcomm
