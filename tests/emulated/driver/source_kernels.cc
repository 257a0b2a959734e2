// The kernels as a host compiler sees them (the source path). Compiled once for each part, so that
// no part takes long; the parts find each other through a list.
#include "source_kernels.h"

#include "cuda/kernels.cuh"
#include "cuda/packets.cuh"
#include "cuda/platform.cuh"
#include "cuda/wire.cuh"
#include "kernels.h"

// Which elements this part has.
#if DPCOMM_PART == 1
#define DPCOMM_KERNELS_OF_Float32 DPCOMM_ENTRY
#else
#define DPCOMM_KERNELS_OF_Float32(...)
#endif
#if DPCOMM_PART == 2
#define DPCOMM_KERNELS_OF_Float16 DPCOMM_ENTRY
#else
#define DPCOMM_KERNELS_OF_Float16(...)
#endif
#if DPCOMM_PART == 3
#define DPCOMM_KERNELS_OF_BFloat16 DPCOMM_ENTRY
#else
#define DPCOMM_KERNELS_OF_BFloat16(...)
#endif
#if DPCOMM_PART == 0
#define DPCOMM_KERNELS_OF_Int32 DPCOMM_ENTRY
#define DPCOMM_KERNELS_OF_Int64 DPCOMM_ENTRY
#define DPCOMM_KERNELS_OF_Float64 DPCOMM_ENTRY
#else
#define DPCOMM_KERNELS_OF_Int32(...)
#define DPCOMM_KERNELS_OF_Int64(...)
#define DPCOMM_KERNELS_OF_Float64(...)
#endif

namespace dpcomm::emulated {
namespace {

#define DPCOMM_ENTRY(Element, element, Wire, wire)                                          \
  {"collective_" #element "_" #wire,                                                        \
   [](const KernelArgs& args) { gpu::run_schedule<gpu::Wire<gpu::Element>, true>(args); }}, \
      {"packets_" #element "_" #wire,                                                       \
       [](const KernelArgs& args) { gpu::run_packets<gpu::Wire<gpu::Element>>(args); }},
#define DPCOMM_KERNEL(Element, element, Wire, wire) \
  DPCOMM_KERNELS_OF_##Element(Element, element, Wire, wire)

const SourceKernel kKernels[] = {
#if DPCOMM_PART == 0
    {"collective_bytes_native",
     [](const KernelArgs& args) { gpu::run_schedule<gpu::Native<gpu::Bytes>, false>(args); }},
#endif
#include "cuda/kernels.def"
};

#undef DPCOMM_KERNEL

SourcePart part(kKernels, sizeof(kKernels) / sizeof(kKernels[0]));

}  // namespace

#if DPCOMM_PART == 0
SourcePart* SourcePart::first = nullptr;

KernelBody find_kernel(const std::string& name) {
  for (const SourcePart* part = SourcePart::first; part != nullptr; part = part->next) {
    for (size_t i = 0; i < part->count; ++i) {
      if (name == part->kernels[i].name) return part->kernels[i].body;
    }
  }
  return nullptr;
}
#endif

}  // namespace dpcomm::emulated
