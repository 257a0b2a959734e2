// Runs translated kernels for the tests of the translator: a C function for Python, and a main()
// for sanitizers, which cannot be loaded into Python.
#include <cstdio>
#include <cstring>
#include <exception>
#include <string>

#include "emulator.h"
#include "machine.h"

namespace ptx {
extern const Kernel* const kernels[];
extern const int kernel_count;
}  // namespace ptx

namespace {

const ptx::Kernel* find(const char* name) {
  for (int i = 0; i < ptx::kernel_count; ++i) {
    if (std::strcmp(ptx::kernels[i]->name, name) == 0) return ptx::kernels[i];
  }
  return nullptr;
}

std::string run(const char* name, const void* parameters, uint32_t blocks_x, uint32_t blocks_y,
                uint32_t threads, uint64_t seed) {
  const ptx::Kernel* kernel = find(name);
  if (kernel == nullptr) return "no such kernel";
  try {
    dpcomm::emulated::WorldOptions options;
    options.seed = seed;
    options.limit_s = 20;
    dpcomm::emulated::World world(options);
    dpcomm::emulated::Launch launch;
    launch.name = name;
    launch.blocks_x = blocks_x;
    launch.blocks_y = blocks_y;
    launch.threads = threads;
    launch.body = [kernel, parameters] { kernel->run(parameters); };
    world.launch(launch);
    world.run();
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

}  // namespace

/// Runs a grid. Returns: empty, or what went wrong, until the next call.
extern "C" const char* ptx_run(const char* name, const void* parameters, uint32_t blocks_x,
                               uint32_t blocks_y, uint32_t threads, uint64_t seed) {
  static std::string problem;
  problem = run(name, parameters, blocks_x, blocks_y, threads, seed);
  return problem.c_str();
}

/// arguments: kernel, seed, blocks_x. The kernel's one parameter is a kilobyte of zeroes.
int main(int count, char** arguments) {
  if (count != 4) return 2;
  alignas(128) static char memory[1024];
  void* parameter = memory;
  const std::string problem =
      run(arguments[1], &parameter, std::stoul(arguments[3]), 1, 32, std::stoul(arguments[2]));
  std::puts(problem.empty() ? "ran" : problem.c_str());
  return problem.empty() ? 0 : 1;
}
