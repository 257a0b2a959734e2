// Checks for the programs: the first that fails ends the program with a message.
#pragma once

#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>

#define CHECK(condition)                                                    \
  do {                                                                      \
    if (!(condition)) {                                                     \
      std::printf("%s:%d: not true: %s\n", __FILE__, __LINE__, #condition); \
      std::fflush(stdout);                                                  \
      std::_Exit(1);                                                        \
    }                                                                       \
  } while (0)

/// The call gives exactly this error, which is then forgotten.
#define GIVES(error, call)                                                   \
  do {                                                                       \
    const cudaError_t got_ = (call);                                         \
    (void)cudaGetLastError();                                                \
    if (got_ != (error)) {                                                   \
      std::printf("%s:%d: %s gives %s, not %s\n", __FILE__, __LINE__, #call, \
                  cudaGetErrorName(got_), cudaGetErrorName(error));          \
      std::fflush(stdout);                                                   \
      std::_Exit(1);                                                         \
    }                                                                        \
  } while (0)
#define OK(call) GIVES(cudaSuccess, call)

/// Zeroed memory of the current device.
template <class T>
T* device_array(size_t count) {
  void* memory = nullptr;
  OK(cudaMalloc(&memory, count * sizeof(T)));
  OK(cudaMemset(memory, 0, count * sizeof(T)));
  OK(cudaDeviceSynchronize());
  return static_cast<T*>(memory);
}

/// Zeroed host memory that the device sees.
template <class T>
T* host_array(size_t count) {
  void* memory = nullptr;
  OK(cudaHostAlloc(&memory, count * sizeof(T), cudaHostAllocMapped));
  for (size_t i = 0; i < count; ++i) static_cast<T*>(memory)[i] = T{};
  return static_cast<T*>(memory);
}

template <class T>
T value_at(const T* place) {
  T value{};
  OK(cudaMemcpy(&value, place, sizeof(T), cudaMemcpyDefault));
  return value;
}
