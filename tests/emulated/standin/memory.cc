// Memory of the stand-in: blocks of the fake runtime's memory, overwritten once they are free.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <map>
#include <mutex>
#include <set>

#include "device.h"

namespace standin {
namespace {

struct Block {
  void* data;
  size_t bytes;
  c10::Stream stream;          // that allocated it
  std::set<int64_t> recorded;  // others that use it
};

struct Heap {
  std::mutex mutex;
  std::map<const void*, Block*> used;                // by address
  std::multimap<size_t, void*> free;                 // poisoned, by size
  std::map<c10::DeviceIndex, cudaStream_t> reapers;  // where blocks are overwritten
  std::atomic<int64_t> waiting{0}, poisoned{0};
};

Heap& heap() {
  static Heap* made = new Heap;
  return *made;
}

/// In a thread of the runtime, with no stream left that may use the block.
void poison(void* data) {
  auto* block = static_cast<Block*>(data);
  std::memset(block->data, kPoison, block->bytes);
  heap().waiting.fetch_sub(1);
  heap().poisoned.fetch_add(1);
  const std::lock_guard<std::mutex> lock(heap().mutex);
  heap().free.emplace(block->bytes, block->data);
  delete block;
}

cudaStream_t reaper(c10::DeviceIndex device) {
  cudaStream_t& stream = heap().reapers[device];
  if (stream == nullptr) {
    STANDIN_CHECK(cudaStreamCreateWithPriority(&stream, kStreamNonBlocking, 0));
  }
  return stream;
}

void wait_for(cudaStream_t waiting, cudaStream_t stream) {
  cudaEvent_t event = nullptr;
  STANDIN_CHECK(cudaEventCreateWithFlags(&event, kEventDisableTiming));
  STANDIN_CHECK(cudaEventRecord(event, stream));
  STANDIN_CHECK(cudaStreamWaitEvent(waiting, event, 0));
  STANDIN_CHECK(cudaEventDestroy(event));
}

void free_block(void* data) {
  if (data == nullptr) return;
  Block* block = nullptr;
  cudaStream_t stream = nullptr;
  {
    const std::lock_guard<std::mutex> lock(heap().mutex);
    const auto found = heap().used.find(data);
    block = found->second;
    heap().used.erase(found);
    stream = reaper(block->stream.device_index());
  }
  std::vector<cudaStream_t> users{native(block->stream)};
  for (const int64_t id : block->recorded) {
    users.push_back(native(c10::Stream(c10::Stream::UNSAFE, block->stream.device(), id)));
  }
  if (std::any_of(users.begin(), users.end(), &is_capturing)) return;
  for (const cudaStream_t user : users) wait_for(stream, user);
  heap().waiting.fetch_add(1);
  STANDIN_CHECK(cudaLaunchHostFunc(stream, &poison, block));
}

/// Also while a stream captures.
void* new_memory(size_t bytes) {
  int mode = kCaptureRelaxed;
  STANDIN_CHECK(cudaThreadExchangeStreamCaptureMode(&mode));
  void* data = nullptr;
  const cudaError_t error = cudaMalloc(&data, bytes);
  STANDIN_CHECK(cudaThreadExchangeStreamCaptureMode(&mode));
  check(error, "cudaMalloc");
  std::memset(data, kPoison, bytes);
  return data;
}

struct StandinAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    int index = 0;
    STANDIN_CHECK(cudaGetDevice(&index));
    const c10::Device device(kType, static_cast<c10::DeviceIndex>(index));
    if (bytes == 0) return {nullptr, nullptr, &free_block, device};
    bytes = (bytes + 255) / 256 * 256;
    void* data = nullptr;
    {
      const std::lock_guard<std::mutex> lock(heap().mutex);
      const auto found = heap().free.find(bytes);
      if (found != heap().free.end()) {
        data = found->second;
        heap().free.erase(found);
      }
    }
    if (data == nullptr) data = new_memory(bytes);
    const std::lock_guard<std::mutex> lock(heap().mutex);
    heap().used[data] = new Block{data, bytes, current_stream(device.index()), {}};
    return {data, data, &free_block, device};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free_block; }
  void copy_data(void* target, const void* source, size_t bytes) const override {
    enqueue([=] { std::memcpy(target, source, bytes); });
  }
};

/// The block that holds `data`, or null. With the mutex held.
Block* find(const void* data) {
  auto after = heap().used.upper_bound(data);
  if (after == heap().used.begin()) return nullptr;
  Block* block = std::prev(after)->second;
  const auto* end = static_cast<const char*>(block->data) + block->bytes;
  return static_cast<const char*>(data) < end ? block : nullptr;
}

}  // namespace

c10::Allocator& allocator() {
  static StandinAllocator made;
  return made;
}

void record_stream(const c10::DataPtr& data, const c10::Stream& stream) {
  const std::lock_guard<std::mutex> lock(heap().mutex);
  Block* block = find(data.get());
  if (block != nullptr && block->stream != stream) block->recorded.insert(stream.id());
}

std::vector<int64_t> recorded_streams(const void* data) {
  const std::lock_guard<std::mutex> lock(heap().mutex);
  const Block* block = find(data);
  TORCH_CHECK(block != nullptr, "no memory of the stand-in");
  return {block->recorded.begin(), block->recorded.end()};
}

FreedBlocks freed_blocks() { return {heap().waiting.load(), heap().poisoned.load()}; }

}  // namespace standin
