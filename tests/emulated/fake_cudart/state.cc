// Configuration, what every call has in common, and the report.
#include <dlfcn.h>
#include <pthread.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <exception>

#include "runtime.h"

namespace fake_cuda {
namespace {

thread_local cudaError_t last_error = cudaSuccess;
thread_local int device_of_thread = 0;

std::string variable(const char* name, const char* otherwise) {
  const char* value = std::getenv(name);
  return value != nullptr ? value : otherwise;
}

long number(const char* name, long otherwise) {
  const char* value = std::getenv(name);
  return value != nullptr && *value != 0 ? std::strtol(value, nullptr, 10) : otherwise;
}

Config read_config() {
  Config config;
  const int count = static_cast<int>(number("FAKE_CUDA_DEVICES", 4));
  const char* visible = std::getenv("CUDA_VISIBLE_DEVICES");
  if (visible == nullptr) {
    for (int i = 0; i < count; ++i) config.devices.push_back(i);
  } else {
    // As with CUDA, the first number that is not a device ends the list.
    for (const char* at = visible; *at != 0;) {
      char* end = nullptr;
      const long device = std::strtol(at, &end, 10);
      if (end == at || device < 0 || device >= count) break;
      config.devices.push_back(static_cast<int>(device));
      at = *end == ',' ? end + 1 : end;
    }
  }
  config.driver_version = static_cast<int>(number("FAKE_CUDA_DRIVER_VERSION", 13000));
  config.sms = static_cast<int>(number("FAKE_CUDA_SMS", 8));
  config.blocks_per_sm = static_cast<int>(number("FAKE_CUDA_BLOCKS_PER_SM", 0));
  config.memory_bytes = static_cast<size_t>(number("FAKE_CUDA_MEMORY", 4L << 30));
  config.deadline_s = static_cast<double>(number("FAKE_CUDA_DEADLINE", 120));
  config.seed = static_cast<uint64_t>(number("FAKE_CUDA_SEED", 1));
  config.block_threads = static_cast<int>(number("FAKE_CUDA_BLOCK_THREADS", 0));
  config.jitter_us = number("FAKE_CUDA_JITTER_US", 0);
  config.check_memory = number("FAKE_CUDA_CHECK", 1) != 0;
  config.kernels = variable("FAKE_CUDA_KERNELS", "");
  config.report = variable("FAKE_CUDA_REPORT", "");
  config.failures = variable("FAKE_CUDA_FAIL", "");
  return config;
}

/// The error that FAKE_CUDA_FAIL asks for in this call ("name:nth:error", separated by commas).
cudaError_t injected_failure(const char* name, uint64_t nth) {
  const std::string& all = config().failures;
  for (size_t at = 0; at < all.size();) {
    const size_t end = std::min(all.find(',', at), all.size());
    const std::string item = all.substr(at, end - at);
    at = end + 1;
    const size_t first = item.find(':');
    if (first == std::string::npos || item.compare(0, first, name) != 0) continue;
    const size_t second = item.find(':', first + 1);
    if (std::strtoull(item.c_str() + first + 1, nullptr, 10) != nth) continue;
    const long error =
        second == std::string::npos ? 2 : std::strtol(item.c_str() + second + 1, nullptr, 10);
    return static_cast<cudaError_t>(error);
  }
  return cudaSuccess;
}

/// The child of a process that used the runtime has no worker threads: as with CUDA, nothing works
/// there any more, and the end of the child disturbs nobody.
void handle_forks() {
  pthread_atfork([] { state().mutex.lock(); }, [] { state().mutex.unlock(); },
                 [] {
                   if (state().used) state().forked = true;
                   state().mutex.unlock();
                 });
}

State* make_state() {
  auto* made = new State;
  made->devices.resize(config().devices.size());
  for (size_t i = 0; i < made->devices.size(); ++i) {
    Device& device = made->devices[i];
    device.peers.assign(made->devices.size(), 0);
    device.legacy = new CUstream_st;
    device.legacy->device = static_cast<int>(i);
    device.legacy->legacy = true;
    device.legacy->id = made->next_id++;
  }
  return made;
}

std::string escaped(const std::string& text) {
  std::string out;
  for (const char c : text) {
    if (c == '"' || c == '\\') out += '\\';
    out += c == '\n' ? ' ' : c;
  }
  return out;
}

std::string report_text() {
  State& s = state();
  std::string text = "{\"launches\": " + std::to_string(s.launches);
  size_t streams = 0;
  for (const CUstream_st* stream : s.streams) streams += !stream->per_thread;
  text += ", \"streams\": " + std::to_string(streams);
  text += ", \"events\": " + std::to_string(s.events.size());
  text += ", \"graphs\": " + std::to_string(s.graphs.size());
  text += ", \"executables\": " + std::to_string(s.executables.size());
  text += ", \"initialised\": [";
  const char* comma = "";
  for (size_t i = 0; i < s.devices.size(); ++i) {
    if (!s.devices[i].initialised) continue;
    text += comma + std::to_string(i);
    comma = ", ";
  }
  text += "], \"memory\": [";
  const char* kinds[] = {"device", "peer", "host", "registered"};
  comma = "";
  for (const auto& [start, allocation] : s.memory) {
    text += std::string(comma) + "{\"kind\": \"" + kinds[static_cast<int>(allocation.kind)] +
            "\", \"device\": " + std::to_string(allocation.device) +
            ", \"bytes\": " + std::to_string(allocation.bytes) + "}";
    comma = ", ";
  }
  text += "], \"misuse\": [";
  comma = "";
  for (const std::string& line : s.misuse) {
    text += std::string(comma) + "\"" + escaped(line) + "\"";
    comma = ", ";
  }
  text += "], \"calls\": {";
  comma = "";
  for (const auto& [name, count] : s.calls) {
    text += std::string(comma) + "\"" + name + "\": " + std::to_string(count);
    comma = ", ";
  }
  text += "}, \"launched\": {";
  comma = "";
  for (const auto& [name, count] : s.launched) {
    text += std::string(comma) + "\"" + escaped(name) + "\": " + std::to_string(count);
    comma = ", ";
  }
  return text + "}}\n";
}

/// Written when the process ends by itself.
__attribute__((destructor)) void write_report() {
  if (config().report.empty() || state().forked) return;
  std::string text;
  {
    const Lock lock(state().mutex);
    text = report_text();
  }
  if (config().report == "-") {
    std::fputs(text.c_str(), stderr);
  } else if (std::FILE* file = std::fopen(config().report.c_str(), "a"); file != nullptr) {
    std::fputs(text.c_str(), file);
    std::fclose(file);
  }
}

}  // namespace

const Config& config() {
  static const Config* made = new Config(read_config());
  return *made;
}

State& state() {
  static State* made = make_state();
  static const bool handled = (handle_forks(), true);
  (void)handled;
  return *made;
}

int current_device() { return device_of_thread; }
bool valid_device(int device) {
  return device >= 0 && device < static_cast<int>(state().devices.size());
}
void note_misuse(const std::string& text) {
  state().misuse.push_back(text);
  std::fprintf(stderr, "fake CUDA runtime: %s\n", text.c_str());
}
int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

cudaError_t call(const char* name, bool needs_device,
                 const std::function<cudaError_t(Lock&)>& body) {
  cudaError_t error = cudaSuccess;
  try {
    Lock lock(state().mutex);
    State& s = state();
    const uint64_t nth = ++s.calls[name];
    if (needs_device) {
      s.used = true;
      if (s.forked) {
        error = cudaErrorInitializationError;
      } else if (config().driver_version < 13000) {
        error = cudaErrorInsufficientDriver;
      } else if (s.devices.empty()) {
        error = cudaErrorNoDevice;
      } else {
        error = s.devices[device_of_thread].broken;
      }
    }
    if (error == cudaSuccess) error = injected_failure(name, nth);
    if (error == cudaSuccess) error = body(lock);
  } catch (const std::exception& failure) {
    std::fprintf(stderr, "fake CUDA runtime: %s: %s\n", name, failure.what());
    error = cudaErrorUnknown;
  }
  if (error != cudaSuccess) last_error = error;
  return error;
}

}  // namespace fake_cuda

using namespace fake_cuda;

cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  const Lock lock(state().mutex);
  if (error == cudaSuccess && valid_device(device_of_thread)) {
    return state().devices[device_of_thread].broken;
  }
  return error;
}

cudaError_t cudaPeekAtLastError() {
  if (last_error != cudaSuccess) return last_error;
  const Lock lock(state().mutex);
  return valid_device(device_of_thread) ? state().devices[device_of_thread].broken : cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  return host_call("cudaSetDevice", [=](Lock&) {
    state().used = true;
    if (state().forked) return cudaErrorInitializationError;
    if (config().driver_version < 13000) return cudaErrorInsufficientDriver;
    if (state().devices.empty()) return cudaErrorNoDevice;
    if (!valid_device(device)) return cudaErrorInvalidDevice;
    device_of_thread = device;
    state().devices[device].initialised = true;
    return state().devices[device].broken;
  });
}

cudaError_t cudaGetDevice(int* device) {
  return device_call("cudaGetDevice", [=](Lock&) {
    if (device == nullptr) return cudaErrorInvalidValue;
    *device = device_of_thread;
    return cudaSuccess;
  });
}
