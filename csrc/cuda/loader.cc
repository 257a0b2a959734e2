// Finds and loads libdpcomm_cuda.so. The library stays loaded: engines may live until the process
// ends.
#include <dlfcn.h>

#include "base/env.h"
#include "base/error.h"
#include "cuda/engine.h"
#include "cuda/plugin.h"

namespace dpcomm {
namespace {

constexpr const char* kLibrary = "libdpcomm_cuda.so";

/// The library that lies beside the module that this code is in, or the one that is named.
std::string library_path() {
  const std::string named = environment(Variable::CUDA_LIBRARY);
  if (!named.empty()) return named;
  Dl_info info{};
  if (dladdr(reinterpret_cast<const void*>(&library_path), &info) == 0 || !info.dli_fname) {
    return kLibrary;
  }
  const std::string module = info.dli_fname;
  const size_t slash = module.rfind('/');
  return (slash == std::string::npos ? "" : module.substr(0, slash + 1)) + kLibrary;
}

struct Loaded {
  const CudaPlugin* plugin = nullptr;
  std::string why;  ///< not, if there is none
};

Loaded load() {
  const std::string path = library_path();
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
  if (library == nullptr) {
    const char* error = dlerror();
    const std::string text = error == nullptr ? "" : error;
    const bool absent = text.find("No such file") != std::string::npos;
    if (absent && environment(Variable::CUDA_LIBRARY).empty()) {
      return {nullptr, "no CUDA device: this build has no CUDA part"};
    }
    return {nullptr, "no CUDA device: the CUDA part cannot be loaded (" + text + ")"};
  }
  const auto function = reinterpret_cast<CudaPluginFunction>(dlsym(library, kCudaPluginSymbol));
  const CudaPlugin* plugin = function == nullptr ? nullptr : function();
  if (plugin == nullptr || plugin->build != plugin_build()) {
    return {nullptr, str("no CUDA device: ", path, " is of another build (",
                         plugin == nullptr ? "?" : plugin->build, "; not ", plugin_build(), ")")};
  }
  return {plugin, ""};
}

/// Once a process; a second attempt would find the same.
const Loaded& loaded() {
  static const Loaded* const all = new Loaded(load());
  return *all;
}

const CudaPlugin& plugin() {
  if (loaded().plugin == nullptr) throw usage_error(loaded().why);
  return *loaded().plugin;
}

}  // namespace

int device_count(std::string* why) {
  if (loaded().plugin != nullptr) return loaded().plugin->device_count(why);
  if (why != nullptr) *why = loaded().why;
  return 0;
}

int device_of(const void* memory) {
  return loaded().plugin == nullptr ? -1 : loaded().plugin->device_of(memory);
}

int resident_ctas(int device, int ranks, int wanted) {
  return plugin().resident_ctas(device, ranks, wanted);
}

std::unique_ptr<DeviceEngine> make_device_engine(const DeviceSetup& setup) {
  return plugin().make_device_engine(setup);
}

std::unique_ptr<VirtualGroup> make_virtual_group(const DeviceSetup& setup) {
  return plugin().make_virtual_group(setup);
}

}  // namespace dpcomm
