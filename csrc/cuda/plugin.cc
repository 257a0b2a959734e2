// The entry of libdpcomm_cuda.so, and what it says of the devices that are there.
#include "cuda/plugin.h"

#include <algorithm>

#include "cuda/kernels.h"
#include "cuda/plugin_parts.h"
#include "cuda/runtime.h"
#include "schedule/registry.h"

namespace dpcomm {

std::string describe(cudaError_t error) {
  return str(cudaGetErrorString(error), " (CUDA error ", static_cast<int>(error), ")");
}

namespace {

/// Calls use(kernel, function) for every kernel of the library.
template <class Use>
void for_each_kernel(Use use) {
  for (int element = 0; element <= static_cast<int>(DeviceElement::kBytes); ++element) {
    for (int wire = 0; wire < kWireFormats; ++wire) {
      for (const bool packets : {false, true}) {
        const KernelId kernel{static_cast<DeviceElement>(element), static_cast<WireFormat>(wire),
                              packets};
        if (const void* function = kernel_symbol(kernel)) use(kernel, function);
      }
    }
  }
}

int count_devices(std::string* why) {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaSuccess && count > 0) return count;
  if (error != cudaSuccess) cudaGetLastError();
  if (why == nullptr) return 0;
  if (error == cudaErrorInsufficientDriver) {
    int driver = 0;
    const bool absent = cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0;
    *why = str("no CUDA device: the driver is ", absent ? "missing" : "too old", " (error ",
               static_cast<int>(error), ": ", cudaGetErrorString(error), "; CUDA ",
               CUDART_VERSION / 1000, " needs an ", CUDART_VERSION >= 13000 ? "r580" : "r525",
               " driver or newer)");
  } else if (error == cudaErrorNoDevice || error == cudaSuccess) {
    *why = "no CUDA device: none is visible (CUDA_VISIBLE_DEVICES, nvidia-smi)";
  } else {
    *why = str("no CUDA device: ", describe(error));
  }
  return 0;
}

int find_device(const void* memory) {
  cudaPointerAttributes attributes{};
  if (cudaPointerGetAttributes(&attributes, memory) != cudaSuccess) {
    cudaGetLastError();
    return -1;
  }
  const bool on_device =
      attributes.type == cudaMemoryTypeDevice || attributes.type == cudaMemoryTypeManaged;
  return on_device ? attributes.device : -1;
}

int count_resident_ctas(int device, int ranks, int wanted) {
  require_device(device);
  const DeviceGuard guard(device);
  int sms = 0;
  check_cuda(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device),
             "multiprocessors of CUDA device ", device);
  int lanes = 1;
  for (const AlgorithmInfo& algorithm : kAlgorithms) lanes = std::max(lanes, algorithm.lanes);
  int ctas = wanted;
  for_each_kernel([&](const KernelId& kernel, const void* function) {
    int blocks = 0;
    const int threads = block_threads(kernel);
    check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, function, threads, 0),
               "kernel ", kernel_name(kernel), " on CUDA device ", device);
    ctas = std::min(ctas, blocks * sms / ((kernel.packets ? 1 : lanes) * ranks));
  });
  if (ctas < 1) {
    throw usage_error("CUDA device ", device, " with ", sms,
                      " multiprocessors cannot hold one CTA of each of ", ranks,
                      " ranks at a time");
  }
  return ctas;
}

}  // namespace

void require_device(int device) {
  std::string why;
  const int count = count_devices(&why);
  if (count == 0) throw usage_error(why);
  if (device < 0 || device >= count) {
    throw usage_error("no CUDA device ", device, ": there are devices 0..", count - 1);
  }
}

}  // namespace dpcomm

extern "C" __attribute__((visibility("default"))) const dpcomm::CudaPlugin* dpcomm_cuda_plugin() {
  using namespace dpcomm;
  static const CudaPlugin* const plugin =
      new CudaPlugin{plugin_build(),       &count_devices,    &find_device,
                     &count_resident_ctas, &make_cuda_engine, &make_cuda_group};
  return plugin;
}
