// Kernels: registration by the objects that nvcc made, occupancy and launches.
#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstring>

#include "runtime.h"

namespace fake_cuda {
namespace {

constexpr int kThreadsPerSm = 2048;
constexpr int kBlocksPerSm = 32;
constexpr int kRegistersPerSm = 64 << 10;
constexpr size_t kSharedPerSm = 228 << 10;
constexpr size_t kSharedReserved = 1 << 10;
constexpr int kMostDynamicShared = 227 << 10;

struct CallConfiguration {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
};
thread_local std::vector<CallConfiguration> pushed;

/// Loads the libraries of FAKE_CUDA_KERNELS once. Without the lock: they register kernels.
void load_kernels() {
  static const bool loaded = [] {
    const std::string& all = config().kernels;
    for (size_t at = 0; at < all.size();) {
      const size_t end = std::min(all.find(':', at), all.size());
      const std::string path = all.substr(at, end - at);
      at = end + 1;
      if (!path.empty() && dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL) == nullptr) {
        std::fprintf(stderr, "fake CUDA runtime: %s\n", dlerror());
      }
    }
    return true;
  }();
  (void)loaded;
}

struct Found {
  HostFunction* host = nullptr;
  const EmulatedKernel* kernel = nullptr;
};

/// Both are null, or none.
Found find_kernel(const void* function) {
  const auto host = state().functions.find(function);
  if (host == state().functions.end()) return {};
  const auto kernel = state().kernels.find(host->second.name);
  if (kernel == state().kernels.end()) {
    note_misuse("no emulated kernel " + host->second.name);
    return {};
  }
  return {&host->second, kernel->second};
}

uint32_t registers_of(const EmulatedKernel& k) { return k.registers != 0 ? k.registers : 64; }
int max_threads_of(const EmulatedKernel& k) {
  return k.max_threads != 0 ? static_cast<int>(k.max_threads) : 1024;
}

/// Blocks of a kernel that an SM holds at the same time.
int blocks_per_sm(const EmulatedKernel& kernel, int threads, size_t dynamic_shared) {
  if (config().blocks_per_sm > 0) return config().blocks_per_sm;
  const int warps = (threads + 31) / 32;
  const size_t shared = kernel.shared_bytes + dynamic_shared + kSharedReserved;
  const int registers = static_cast<int>(registers_of(kernel)) * 32 * warps;
  return std::min({kBlocksPerSm, kThreadsPerSm / (32 * warps), kRegistersPerSm / registers,
                   static_cast<int>(kSharedPerSm / shared)});
}

cudaError_t check_shape(const Found& found, const LaunchShape& shape) {
  const uint64_t threads = uint64_t{shape.block.x} * shape.block.y * shape.block.z;
  const uint64_t blocks = uint64_t{shape.grid.x} * shape.grid.y * shape.grid.z;
  if (threads == 0 || threads > 1024 || blocks == 0) return cudaErrorInvalidConfiguration;
  if (shape.grid.x > 0x7fffffffu || shape.grid.y > 65535 || shape.grid.z > 65535) {
    return cudaErrorInvalidConfiguration;
  }
  if (shape.dynamic_shared > static_cast<size_t>(found.host->max_dynamic_shared)) {
    return cudaErrorInvalidValue;
  }
  if (static_cast<int>(threads) > max_threads_of(*found.kernel) || shape.resident == 0) {
    return cudaErrorLaunchOutOfResources;
  }
  // What the emulation does not have: the third dimension, and blocks of several dimensions.
  if (shape.block.y != 1 || shape.block.z != 1 || shape.grid.z != 1) return cudaErrorNotSupported;
  if (shape.cooperative && blocks > static_cast<uint64_t>(shape.resident)) {
    return cudaErrorCooperativeLaunchTooLarge;
  }
  return cudaSuccess;
}

std::vector<char> gather(const EmulatedKernel& kernel, void** arguments) {
  std::vector<char> buffer(kernel.argument_bytes);
  for (int i = 0; i < kernel.argument_count; ++i) {
    std::memcpy(buffer.data() + kernel.offsets[i], arguments[i], kernel.sizes[i]);
  }
  return buffer;
}

/// The file that a kernel was registered from.
std::string library_of(const EmulatedKernel& kernel) {
  Dl_info info{};
  if (dladdr(reinterpret_cast<const void*>(kernel.thread), &info) == 0) return "?";
  const std::string path = info.dli_fname;
  return path.substr(path.rfind('/') + 1);
}

void run_launch(const EmulatedKernel& kernel, const LaunchShape& shape,
                const std::vector<char>& arguments) {
  std::string why;
  Lock lock(state().mutex);
  const uint64_t number = ++state().launches;
  ++state().launched[library_of(kernel) + ": " + kernel.name];
  lock.unlock();
  if (run_kernel(kernel, shape, number, arguments, &why)) return;
  lock.lock();
  note_misuse("kernel " + std::string(kernel.name) + " failed: " + why);
  const bool outside = why.find("outside of all memory") != std::string::npos;
  state().devices[shape.device].broken = why.rfind("deadline", 0) == 0 ? cudaErrorLaunchTimeout
                                         : outside                     ? cudaErrorIllegalAddress
                                                                       : cudaErrorLaunchFailure;
}

cudaError_t launch(const void* function, LaunchShape shape, void** arguments, cudaStream_t handle) {
  const Found found = find_kernel(function);
  if (found.kernel == nullptr) return cudaErrorInvalidDeviceFunction;
  CUstream_st* stream = resolve(handle);
  // A kernel is launched on the current device, so the stream has to be one of its own.
  if (stream == nullptr || stream->device != current_device()) {
    return cudaErrorInvalidResourceHandle;
  }
  const int threads = static_cast<int>(shape.block.x * shape.block.y * shape.block.z);
  shape.device = stream->device;
  shape.resident =
      threads > 0 ? config().sms * blocks_per_sm(*found.kernel, threads, shape.dynamic_shared) : 0;
  if (const cudaError_t error = check_shape(found, shape); error != cudaSuccess) return error;
  if (arguments == nullptr && found.kernel->argument_count > 0) return cudaErrorInvalidValue;
  return submit(
      stream, Operation{Operation::Kind::kKernel,
                        [shape, kernel = found.kernel, buffer = gather(*found.kernel, arguments)] {
                          run_launch(*kernel, shape, buffer);
                        }});
}

}  // namespace

extern "C" void fake_cuda_register_kernel(const EmulatedKernel* kernel) {
  const Lock lock(state().mutex);
  if (kernel->name == nullptr) {
    note_misuse("a kernel whose symbol is not exported");
    return;
  }
  state().kernels[kernel->name] = kernel;
}

extern "C" const char* fake_cuda_symbol_name(const void* function) {
  Dl_info info{};
  return dladdr(function, &info) != 0 && info.dli_saddr == function ? info.dli_sname : nullptr;
}

}  // namespace fake_cuda

using namespace fake_cuda;

// --- what nvcc's objects call --------------------------------------------------------------------
#pragma GCC visibility push(default)
extern "C" {
void** __cudaRegisterFatBinary(void*) { return reinterpret_cast<void**>(new char); }
void __cudaRegisterFatBinaryEnd(void**) {}
char __cudaInitModule(void**) { return 0; }

void __cudaUnregisterFatBinary(void** module) {
  const Lock lock(state().mutex);
  auto& functions = state().functions;
  for (auto at = functions.begin(); at != functions.end();) {
    at = at->second.module == module ? functions.erase(at) : std::next(at);
  }
}

void __cudaRegisterFunction(void** module, const char* host, char*, const char* name, int, uint3*,
                            uint3*, dim3*, dim3*, int*) {
  const Lock lock(state().mutex);
  HostFunction function;
  function.name = name;
  function.module = module;
  state().functions[host] = function;
}

void __cudaRegisterVar(void**, char*, char*, const char* name, int, size_t, int, int) {
  const Lock lock(state().mutex);
  note_misuse(std::string("the device variable ") + name + " is not emulated");
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  pushed.push_back({grid, block, shared, stream});
  return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  if (pushed.empty()) return cudaErrorUnknown;
  const CallConfiguration top = pushed.back();
  pushed.pop_back();
  *grid = top.grid;
  *block = top.block;
  *shared = top.shared;
  *static_cast<cudaStream_t*>(stream) = top.stream;
  return cudaSuccess;
}

cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  // The handle is the host function itself, so a kernel handle works wherever a function does.
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments,
                               size_t shared, cudaStream_t stream) {
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block, arguments, shared,
                          stream);
}
}  // extern "C"
#pragma GCC visibility pop

// --- the API -------------------------------------------------------------------------------------
cudaError_t cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  if (kernel == nullptr) return cudaErrorInvalidValue;
  return __cudaGetKernel(kernel, function);
}

cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments,
                             size_t shared, cudaStream_t stream) {
  load_kernels();
  return device_call("cudaLaunchKernel", [=](Lock&) {
    LaunchShape shape{grid, block, shared};
    return launch(function, shape, arguments, stream);
  });
}

cudaError_t cudaLaunchCooperativeKernel(const void* function, dim3 grid, dim3 block,
                                        void** arguments, size_t shared, cudaStream_t stream) {
  load_kernels();
  return device_call("cudaLaunchCooperativeKernel", [=](Lock&) {
    LaunchShape shape{grid, block, shared};
    shape.cooperative = true;
    return launch(function, shape, arguments, stream);
  });
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* given, const void* function,
                                void** arguments) {
  load_kernels();
  return device_call("cudaLaunchKernelExC", [=](Lock&) {
    if (given == nullptr) return cudaErrorInvalidValue;
    LaunchShape shape{given->gridDim, given->blockDim, given->dynamicSmemBytes};
    for (unsigned i = 0; i < given->numAttrs; ++i) {
      const cudaLaunchAttribute& attribute = given->attrs[i];
      if (attribute.id == cudaLaunchAttributeCooperative) {
        shape.cooperative = attribute.val.cooperative != 0;
      } else if (attribute.id != cudaLaunchAttributeIgnore &&
                 attribute.id != cudaLaunchAttributePriority) {
        return cudaErrorNotSupported;
      }
    }
    return launch(function, shape, arguments, given->stream);
  });
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* function) {
  load_kernels();
  return device_call("cudaFuncGetAttributes", [=](Lock&) {
    const Found found = find_kernel(function);
    if (attributes == nullptr) return cudaErrorInvalidValue;
    if (found.kernel == nullptr) return cudaErrorInvalidDeviceFunction;
    std::memset(attributes, 0, sizeof(*attributes));
    attributes->sharedSizeBytes = found.kernel->shared_bytes;
    attributes->maxThreadsPerBlock = max_threads_of(*found.kernel);
    attributes->numRegs = static_cast<int>(registers_of(*found.kernel));
    attributes->ptxVersion = attributes->binaryVersion = 90;
    attributes->maxDynamicSharedSizeBytes = found.host->max_dynamic_shared;
    return cudaSuccess;
  });
}

cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  load_kernels();
  return device_call("cudaFuncSetAttribute", [=](Lock&) {
    const Found found = find_kernel(function);
    if (found.kernel == nullptr) return cudaErrorInvalidDeviceFunction;
    if (attribute == cudaFuncAttributePreferredSharedMemoryCarveout) return cudaSuccess;
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaErrorNotSupported;
    const int most = kMostDynamicShared - static_cast<int>(found.kernel->shared_bytes);
    if (value < 0 || value > most) return cudaErrorInvalidValue;
    found.host->max_dynamic_shared = value;
    return cudaSuccess;
  });
}

cudaError_t cudaFuncGetName(const char** name, const void* function) {
  return device_call("cudaFuncGetName", [=](Lock&) {
    const auto found = state().functions.find(function);
    if (name == nullptr) return cudaErrorInvalidValue;
    if (found == state().functions.end()) return cudaErrorInvalidDeviceFunction;
    *name = found->second.name.c_str();
    return cudaSuccess;
  });
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks,
                                                                   const void* function,
                                                                   int threads, size_t shared,
                                                                   unsigned) {
  load_kernels();
  return device_call("cudaOccupancyMaxActiveBlocksPerMultiprocessor", [=](Lock&) {
    const Found found = find_kernel(function);
    if (blocks == nullptr || threads <= 0) return cudaErrorInvalidValue;
    if (found.kernel == nullptr) return cudaErrorInvalidDeviceFunction;
    *blocks = threads <= max_threads_of(*found.kernel)
                  ? blocks_per_sm(*found.kernel, threads, shared)
                  : 0;
    return cudaSuccess;
  });
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* function,
                                                          int threads, size_t shared) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, function, threads, shared,
                                                                0);
}
