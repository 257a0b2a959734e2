// A device for torch that is none: PrivateUse1 with the fake runtime's streams and events, and host
// memory. For the tests of what dpcomm does on a device, with the real torch around it.
//
// Streams. Stream 0 of a device is the legacy default stream; all others are non-blocking ones, as
// torch has them on CUDA. fill_, zero_ and copies within the device are put into the current stream
// and run when it comes to them; every other operator waits for the current stream, and for no
// other, and runs at once on the CPU. What is not ordered by events shows as a wrong result.
//
// Memory. What is freed is overwritten as soon as the stream that allocated it, and those that
// record_stream() named, have come to that point. A use that nobody recorded shows as kPoison. What
// a stream uses that captures a graph is never freed.
#pragma once

#include <c10/core/Allocator.h>
#include <c10/core/Device.h>
#include <c10/core/Stream.h>

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "runtime.h"

namespace standin {

inline constexpr auto kType = c10::DeviceType::PrivateUse1;
inline constexpr unsigned char kPoison = 0xfb;

/// Throws c10::Error with the text of a failed call.
void check(cudaError_t error, const char* what);
#define STANDIN_CHECK(call) ::standin::check(call, #call)

/// The calling thread's current stream of a device.
c10::Stream current_stream(c10::DeviceIndex device);
cudaStream_t native(const c10::Stream& stream);

bool is_capturing(cudaStream_t stream);

/// Puts `function` into the current stream of the current device.
void enqueue(std::function<void()> function);
/// Blocks the host until the current stream of the current device is through.
void synchronize();

c10::Allocator& allocator();
void record_stream(const c10::DataPtr& data, const c10::Stream& stream);

/// For tests: ids of the streams that were recorded for the block that holds `data`.
std::vector<int64_t> recorded_streams(const void* data);
/// Blocks that were freed and not yet overwritten, and those that were.
struct FreedBlocks {
  int64_t waiting;
  int64_t poisoned;
};
FreedBlocks freed_blocks();

}  // namespace standin
