#include "torch/shared_tensors.h"

#include <ATen/EmptyTensor.h>
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include <atomic>
#include <optional>
#include <utility>

#include "base/error.h"
#include "base/log.h"
#include "cpu/shared_heap.h"
#include "torch/python_hooks.h"

namespace dpcomm {
namespace {

thread_local bool thread_shares = false;

void free_shared(void* block) {
  c10::profiledCPUMemoryReporter().Delete(block);
  SharedHeap::free(block);
}

/// Throws Error as SharedHeap::allocate() does.
c10::DataPtr allocate_shared(size_t bytes) {
  const c10::Device cpu(c10::DeviceType::CPU);
  if (bytes == 0) return {nullptr, nullptr, &free_shared, cpu};
  void* block = SharedHeap::allocate(bytes);
  c10::profiledCPUMemoryReporter().New(block, bytes);
  return {block, block, &free_shared, cpu};
}

/// Of tensors that were asked for by name.
class SharedAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    return translating([&] { return allocate_shared(bytes); });
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free_shared; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
};

/// Torch's allocator for the CPU, before which it stands; takes over what a thread wants shared.
class SwitchedAllocator final : public c10::Allocator {
 public:
  explicit SwitchedAllocator(c10::Allocator* before) : before_(before) {}

  c10::DataPtr allocate(size_t bytes) override {
    if (thread_shares && bytes >= kSharedBlockBytes) {
      try {
        return allocate_shared(bytes);
      } catch (const Error& error) {
        complain(error);
      }
    }
    return before_->allocate(bytes);
  }
  bool is_simple_data_ptr(const c10::DataPtr& data) const override {
    return before_->is_simple_data_ptr(data);
  }
  c10::DeleterFnPtr raw_deleter() const override;
  void copy_data(void* to, const void* from, size_t bytes) const override {
    before_->copy_data(to, from, bytes);
  }
  c10::Allocator* before() const { return before_; }

 private:
  void complain(const Error& error) {
    if (complained_.exchange(true)) return;
    log_line(LogLevel::kWarn, str(error.what(), "; ordinary memory is used instead"));
  }

  c10::Allocator* const before_;
  std::atomic<bool> complained_{false};
};

SwitchedAllocator& switched_allocator() {
  static auto* allocator = new SwitchedAllocator(c10::GetAllocator(c10::DeviceType::CPU));
  return *allocator;
}

/// Of a block with no DataPtr that would know where it came from.
void free_raw(void* block) {
  if (SharedHeap::holds(block)) {
    free_shared(block);
  } else {
    switched_allocator().before()->raw_deallocate(block);
  }
}

c10::DeleterFnPtr SwitchedAllocator::raw_deleter() const {
  return before_->raw_deleter() == nullptr ? nullptr : &free_raw;
}

void install() {
  c10::SetAllocator(c10::DeviceType::CPU, &switched_allocator());
  if (c10::GetAllocator(c10::DeviceType::CPU) != &switched_allocator()) {
    log_line(LogLevel::kWarn,
             "another library has put an allocator of its own into torch for good, so nothing "
             "can be placed in shared memory but by dpcomm.empty()");
  }
}

}  // namespace

bool set_thread_shared_memory(bool on) {
  if (on) {
    [[maybe_unused]] static const bool installed = (install(), true);
  }
  return std::exchange(thread_shares, on);
}

at::Tensor shared_empty(at::IntArrayRef size, at::ScalarType dtype) {
  static auto* allocator = new SharedAllocator;
  constexpr c10::DispatchKeySet kCpu(c10::DispatchKey::CPU);
  return at::Tensor(at::detail::empty_generic(size, allocator, kCpu, dtype, std::nullopt));
}

}  // namespace dpcomm
