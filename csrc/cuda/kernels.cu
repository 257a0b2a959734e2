// The kernels as nvcc emits them: entry points with the names that cuda/launch_plan.h makes.
#include "cuda/kernels.cuh"
#include "cuda/kernels.h"
#include "cuda/packets.cuh"

#define DPCOMM_ENTRY(name, threads)                                       \
  extern "C" __global__ void __launch_bounds__(threads, 1024 / (threads)) \
      name(const __grid_constant__ dpcomm::KernelArgs args)

#define DPCOMM_KERNEL(Element, element, Wire, wire)                                 \
  DPCOMM_ENTRY(collective_##element##_##wire, dpcomm::kMaxThreads) {                \
    dpcomm::gpu::run_schedule<dpcomm::gpu::Wire<dpcomm::gpu::Element>, true>(args); \
  }                                                                                 \
  DPCOMM_ENTRY(packets_##element##_##wire, dpcomm::kPacketThreads) {                \
    dpcomm::gpu::run_packets<dpcomm::gpu::Wire<dpcomm::gpu::Element>>(args);        \
  }
#include "cuda/kernels.def"
#undef DPCOMM_KERNEL

DPCOMM_ENTRY(collective_bytes_native, dpcomm::kMaxThreads) {
  dpcomm::gpu::run_schedule<dpcomm::gpu::Native<dpcomm::gpu::Bytes>, false>(args);
}

namespace dpcomm {

const void* kernel_symbol(const KernelId& kernel) {
  if (kernel == KernelId{DeviceElement::kBytes, WireFormat::kNative, false}) {
    return reinterpret_cast<const void*>(&collective_bytes_native);
  }
// Not `element` and `wire`: the parameters of a macro would replace the members of those names.
#define DPCOMM_KERNEL(Element, element_name, Wire, wire_name)                              \
  if (kernel.element == DeviceElement::k##Element && kernel.wire == WireFormat::k##Wire) { \
    return kernel.packets                                                                  \
               ? reinterpret_cast<const void*>(&packets_##element_name##_##wire_name)      \
               : reinterpret_cast<const void*>(&collective_##element_name##_##wire_name);  \
  }
#include "cuda/kernels.def"
#undef DPCOMM_KERNEL
  return nullptr;
}

}  // namespace dpcomm
