// Runs a launch on the fiber scheduler of tests/emulated/runtime, in the thread that calls.
//
// Other launches, in this process and in others, run at the same time and may be waited for: such a
// wait is never a deadlock for the scheduler, only late. What ends it is FAKE_CUDA_DEADLINE.
#include <algorithm>
#include <exception>

#include "emulator.h"
#include "runtime.h"

namespace fake_cuda {
namespace {

namespace emulated = dpcomm::emulated;

/// All memory that a kernel may touch, as it is now. Nothing of it is freed while kernels run.
emulated::MemoryMap memory_map() {
  const Lock lock(state().mutex);
  emulated::MemoryMap map;
  for (const auto& [start, a] : state().memory) {
    emulated::Region region;
    region.base = a.start;
    region.bytes = a.bytes;
    region.owner = a.device;
    const bool host = a.kind == MemoryKind::kHost || a.kind == MemoryKind::kRegistered;
    region.kind = host ? emulated::MemoryClass::kHost : emulated::MemoryClass::kTensor;
    region.name = host                          ? "host memory"
                  : a.kind == MemoryKind::kPeer ? "memory of another process"
                                                : "memory of device " + std::to_string(a.device);
    region.name += " (" + std::to_string(a.bytes) + " bytes)";
    map.add(std::move(region));
  }
  return map;
}

}  // namespace

bool run_kernel(const EmulatedKernel& kernel, const LaunchShape& shape, uint64_t number,
                const std::vector<char>& arguments, std::string* why) {
  try {
    emulated::MemoryMap map;
    if (config().check_memory) map = memory_map();
    emulated::WorldOptions options;
    options.seed = config().seed == 0 ? 0 : config().seed * 1000003 + number;
    options.max_resident = shape.resident;
    options.outside_writers = true;
    options.limit_s = config().deadline_s;
    options.memory = config().check_memory ? &map : nullptr;
    emulated::World world(options);
    emulated::Launch launch;
    launch.name = kernel.name;
    launch.blocks_x = shape.grid.x;
    launch.blocks_y = shape.grid.y;
    launch.threads = shape.block.x;
    if (config().block_threads > 0) {
      launch.threads = std::min<uint32_t>(launch.threads, config().block_threads);
    }
    launch.device = shape.device;
    launch.body = [&] { kernel.thread(kernel.context, arguments.data()); };
    world.launch(std::move(launch));
    world.run();
    return true;
  } catch (const emulated::Stuck& stuck) {
    *why = std::string("deadline: ") + stuck.what();
  } catch (const std::exception& fault) {
    *why = fault.what();
  }
  return false;
}

}  // namespace fake_cuda
