// How emulated device code is given to the fake CUDA runtime. No CUDA header here.
//
// A kernel is found by the (mangled) name that nvcc registers for its host stub. Libraries of
// kernels register theirs when they are loaded: FAKE_CUDA_KERNELS names them, separated by colons,
// and the runtime loads them before the first lookup. They are libraries of their own (linked with
// -Bsymbolic), because a kernel compiled by g++ has the same symbol as nvcc's host stub.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

namespace fake_cuda {

/// A kernel, as a cubin's metadata would tell it. All pointers stay valid while the library does.
struct EmulatedKernel {
  const char* name;  ///< as in PTX: the mangled name
  /// The body of one CUDA thread, run as a fiber.
  void (*thread)(const void* context, const void* arguments);
  const void* context;
  int argument_count;
  const uint32_t* offsets;  ///< of each argument in the buffer that `thread` gets
  const uint32_t* sizes;    ///< bytes
  uint32_t argument_bytes;  ///< of the buffer
  uint32_t registers;       ///< of a thread, for occupancy; 0: 64
  uint32_t shared_bytes;    ///< static, of a block
  uint32_t max_threads;     ///< of a block (launch bounds); 0: 1024
};

/// Later registrations of a name replace earlier ones.
extern "C" __attribute__((visibility("default"))) void fake_cuda_register_kernel(
    const EmulatedKernel* kernel);
/// The name of the symbol at `function`, which has to be exported.
extern "C" __attribute__((visibility("default"))) const char* fake_cuda_symbol_name(
    const void* function);

/// Registers a function that g++ compiled, under the name that its symbol has.
template <auto function>
class SourceKernel {
 public:
  explicit SourceKernel(uint32_t max_threads = 0, uint32_t registers = 0) {
    describe(function);
    kernel_.name = fake_cuda_symbol_name(reinterpret_cast<const void*>(function));
    kernel_.max_threads = max_threads;
    kernel_.registers = registers;
    fake_cuda_register_kernel(&kernel_);
  }

 private:
  template <class... Args>
  static void describe(void (*)(Args...)) {
    static_assert(sizeof...(Args) > 0 && (std::is_trivially_copyable_v<Args> && ...));
    uint32_t end = 0;
    int i = 0;
    const auto place = [&](size_t size, size_t alignment) {
      offsets_[i] = static_cast<uint32_t>((end + alignment - 1) / alignment * alignment);
      sizes_[i] = static_cast<uint32_t>(size);
      end = offsets_[i] + sizes_[i];
      ++i;
    };
    (place(sizeof(Args), alignof(Args)), ...);
    kernel_.argument_count = i;
    kernel_.offsets = offsets_;
    kernel_.sizes = sizes_;
    kernel_.argument_bytes = end;
    kernel_.thread = [](const void*, const void* arguments) {
      call<Args...>(arguments, std::index_sequence_for<Args...>());
    };
  }
  template <class... Args, size_t... i>
  static void call(const void* arguments, std::index_sequence<i...>) {
    const char* base = static_cast<const char*>(arguments);
    function(*reinterpret_cast<const Args*>(base + offsets_[i])...);
  }

  static inline EmulatedKernel kernel_{};
  static inline uint32_t offsets_[32];
  static inline uint32_t sizes_[32];
};

}  // namespace fake_cuda
