// Kernels for the tests of the fake runtime: read by nvcc (which makes the host stubs and the
// device code that is not run here) and by g++ (which makes what is run).
#pragma once

#include <cstdint>

#include "cuda/platform.cuh"

#if defined(__CUDACC__)
#define TEST_KERNEL __global__
#else
#define TEST_KERNEL __attribute__((visibility("default")))
#endif

namespace gpu = dpcomm::gpu;

/// data[i] = data[i] * factor + term, over all threads of the grid.
extern "C" TEST_KERNEL void scale_add(int32_t* data, uint64_t count, int32_t factor, int32_t term) {
  for (uint64_t i = gpu::block_x() * gpu::threads() + gpu::thread(); i < count;
       i += gpu::threads()) {
    gpu::store_one<int32_t>(data + i, gpu::load_one<int32_t>(data + i) * factor + term);
  }
}

struct Pair {
  const int32_t* from;
  int32_t* to;
  int32_t extra[30];
};

/// A template with a struct by value: *to = *from + extra[29].
template <class T>
TEST_KERNEL void move_pair(const T pair) {
  if (gpu::thread() == 0) {
    gpu::store_one<int32_t>(pair.to, gpu::load_one<int32_t>(pair.from) + pair.extra[29]);
  }
}

/// Waits until *flag == wanted, leaves earlier if *stop is not 0.
extern "C" TEST_KERNEL void wait_flag(const uint64_t* flag, uint64_t wanted, const uint32_t* stop) {
  if (gpu::thread() == 0) {
    while (gpu::load_flag_relaxed(flag) != wanted) {
      if (stop != nullptr && gpu::load_word_relaxed(stop) != 0) break;
      gpu::pause();
    }
    gpu::load_flag_acquire(flag);
  }
  gpu::block_sync();
}

/// Tells the other that it is here, then waits for the other: *theirs = value, *mine >= value. (The
/// other may be one meeting ahead before this one looks.)
extern "C" TEST_KERNEL void meet(uint64_t* theirs, const uint64_t* mine, uint64_t value) {
  if (gpu::thread() == 0) {
    gpu::fence_system();
    gpu::store_flag_relaxed(theirs, value);
    while (gpu::load_flag_relaxed(mine) < value) gpu::pause();
    gpu::load_flag_acquire(mine);
  }
  gpu::block_sync();
}

/// All blocks of the grid meet: block b sets flags[b], then waits for all.
extern "C" TEST_KERNEL void grid_meet(uint64_t* flags, uint32_t blocks, uint64_t value) {
  gpu::block_sync();
  if (gpu::thread() == 0) {
    gpu::fence_system();
    gpu::store_flag_relaxed(flags + gpu::block_x(), value);
    for (uint32_t b = 0; b < blocks; ++b) {
      while (gpu::load_flag_relaxed(flags + b) != value) gpu::pause();
    }
  }
  gpu::block_sync();
}
