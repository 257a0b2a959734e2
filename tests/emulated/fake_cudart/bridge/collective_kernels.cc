// Gives the collective kernels to the fake runtime, under the names that nvcc's host stubs ask for.
// Linked with whatever defines find_kernel(): the sources as g++ compiles them, or translated PTX.
#include <deque>
#include <string>

#include "cuda/launch_plan.h"
#include "driver/kernels.h"
#include "kernel_registry.h"

namespace {

using dpcomm::DeviceElement;
using dpcomm::KernelArgs;
using dpcomm::KernelId;
using dpcomm::WireFormat;
using dpcomm::emulated::KernelBody;

constexpr uint32_t kOffset = 0;
constexpr uint32_t kSize = sizeof(KernelArgs);

void run_thread(const void* context, const void* arguments) {
  (*static_cast<const KernelBody*>(context))(*static_cast<const KernelArgs*>(arguments));
}

struct Registered {
  std::string name;
  KernelBody body;
  fake_cuda::EmulatedKernel kernel{};
};

/// Leaves out what is not there: not every element goes with every wire format.
struct Register {
  Register() {
    for (int element = 0; element <= static_cast<int>(DeviceElement::kBytes); ++element) {
      for (int wire = 0; wire < dpcomm::kWireFormats; ++wire) {
        for (const bool packets : {false, true}) {
          add(KernelId{static_cast<DeviceElement>(element), static_cast<WireFormat>(wire),
                       packets});
        }
      }
    }
  }

  void add(const KernelId& id) {
    const std::string name = dpcomm::kernel_name(id);
    const KernelBody body = dpcomm::emulated::find_kernel(name);
    if (body == nullptr) return;
    Registered& made = kernels.emplace_back(Registered{name, body});
    made.kernel.name = made.name.c_str();
    made.kernel.thread = run_thread;
    made.kernel.context = &made.body;
    made.kernel.argument_count = 1;
    made.kernel.offsets = &kOffset;
    made.kernel.sizes = &kSize;
    made.kernel.argument_bytes = kSize;
    made.kernel.max_threads = id.packets ? dpcomm::kPacketThreads : dpcomm::kMaxThreads;
    fake_cuda_register_kernel(&made.kernel);
  }

  std::deque<Registered> kernels;
};

Register* const registered = new Register;

}  // namespace
