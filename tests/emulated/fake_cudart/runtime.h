// The state of the fake CUDA runtime: virtual devices whose memory is host memory, streams that are
// worker threads, events, captured graphs. Everything is guarded by one mutex, and nothing of it is
// ever destroyed, so that a process can end while work is queued.
#pragma once

#pragma GCC visibility push(default)
#include <cuda_runtime_api.h>
#pragma GCC visibility pop

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "kernel_registry.h"

namespace fake_cuda {

using Lock = std::unique_lock<std::mutex>;

/// From the environment, read once.
struct Config {
  std::vector<int> devices;  ///< physical numbers of the visible devices
  int driver_version = 13000;
  int sms = 8;
  int blocks_per_sm = 0;  ///< 0: by registers, threads and shared memory
  size_t memory_bytes = size_t{4} << 30;
  double deadline_s = 120;
  uint64_t seed = 1;         ///< of the scheduler; each launch draws its own from it; 0: in order
  int block_threads = 0;     ///< blocks run with at most so many threads; 0: as launched
  long jitter_us = 0;        ///< work of a stream starts up to so much late
  bool check_memory = true;  ///< kernels may touch only memory that the runtime knows
  std::string kernels;       ///< libraries to load, separated by colons
  std::string report;        ///< file for the report at exit; "-": stderr
  std::string failures;      ///< "cudaMalloc:2:2,...": the second call returns error 2
};
const Config& config();

/// Something that will be done. Guarded by the mutex.
struct Done {
  bool done = false;
  int64_t time_ns = 0;
};
using Ticket = std::shared_ptr<Done>;

struct Task {
  std::function<void()> run;
  std::vector<Ticket> after;
  std::function<bool()> ready;  ///< looked at again and again; may be empty
  Ticket done;
};

/// What a stream works on; outlives its handle while tasks are queued.
struct Queue {
  std::deque<Task> tasks;
  bool started = false;
  bool closing = false;
};

/// What is given to a stream, or becomes a node of a graph.
struct Operation {
  enum class Kind { kKernel, kMemcpy, kMemset, kHost, kEmpty } kind = Kind::kEmpty;
  std::function<void()> run;
};

struct Capture;

enum class MemoryKind { kDevice, kPeer, kHost, kRegistered };
struct Allocation {
  MemoryKind kind = MemoryKind::kDevice;
  int device = 0;
  char* start = nullptr;
  size_t bytes = 0;
  char* mapping = nullptr;  ///< whole pages
  size_t mapping_bytes = 0;
  int fd = -1;
  uint64_t inode = 0;
  unsigned flags = 0;
  int opened = 1;  ///< kPeer: how often
};

struct Device {
  cudaStream_t legacy = nullptr;
  cudaError_t broken = cudaSuccess;  ///< a kernel failed: sticky
  size_t allocated_bytes = 0;
  bool initialised = false;  ///< some thread has made it current, which takes memory on a device
  std::vector<char> peers;   ///< peer access enabled
  std::vector<Ticket> abandoned;  ///< the last work of destroyed streams
};

struct HostFunction {
  std::string name;
  void** module = nullptr;
  int max_dynamic_shared = 48 << 10;
};

struct State {
  std::mutex mutex;
  std::condition_variable changed;
  std::vector<Device> devices;
  std::unordered_set<CUstream_st*> streams;
  std::unordered_set<CUevent_st*> events;
  std::unordered_set<CUgraph_st*> graphs;
  std::unordered_set<CUgraphExec_st*> executables;
  std::map<uintptr_t, Allocation> memory;  ///< by start
  std::vector<std::shared_ptr<Capture>> captures;
  std::unordered_map<const void*, HostFunction> functions;
  std::unordered_map<std::string, const EmulatedKernel*> kernels;
  std::map<std::string, uint64_t> calls;
  std::map<std::string, uint64_t> launched;  ///< "library: kernel"
  std::vector<std::string> misuse;           ///< for the report
  uint64_t next_id = 1;
  uint64_t launches = 0;
  bool used = false;    ///< some call has initialised the runtime
  bool forked = false;  ///< ... in the parent of this process
};
State& state();

/// Runs `body(lock)` as the API function `name`: fork, injected failures, broken devices, the last
/// error. Exceptions become cudaErrorUnknown.
cudaError_t call(const char* name, bool needs_device,
                 const std::function<cudaError_t(Lock&)>& body);
/// For the functions that do not touch a device.
template <class Body>
cudaError_t host_call(const char* name, Body body) {
  return call(name, false, body);
}
template <class Body>
cudaError_t device_call(const char* name, Body body) {
  return call(name, true, body);
}

int current_device();
bool valid_device(int device);
void note_misuse(const std::string& text);
int64_t now_ns();

// --- streams ------------------------------------------------------------------------------------
/// The stream behind a handle; null for an invalid one.
CUstream_st* resolve(cudaStream_t handle);
/// Gives an operation to a stream, or to the graph that the stream captures.
cudaError_t submit(CUstream_st* stream, Operation operation);
/// Puts a task in the queue, behind what the rules of the default stream ask for.
Ticket enqueue(CUstream_st* stream, std::function<void()> run, std::vector<Ticket> after = {},
               std::function<bool()> ready = {});
void wait(Lock& lock, const Ticket& ticket);
void wait_device(Lock& lock, int device);

// --- capture ------------------------------------------------------------------------------------
/// An error if the call, which could meet a capture, is forbidden now; invalidates that capture.
cudaError_t unsafe_call();
cudaError_t add_node(CUstream_st* stream, Operation operation);
cudaError_t check_legacy(CUstream_st* stream);
void invalidate(Capture& capture);
cudaError_t record_in_capture(CUstream_st* stream, CUevent_st* event);
cudaError_t wait_in_capture(CUstream_st* stream, CUevent_st* event);

// --- memory -------------------------------------------------------------------------------------
/// The allocation that holds [start, start + bytes), or null.
Allocation* find_memory(const void* start, size_t bytes);
size_t live_allocations();

// --- kernels ------------------------------------------------------------------------------------
struct LaunchShape {
  dim3 grid{1, 1, 1};
  dim3 block{1, 1, 1};
  size_t dynamic_shared = 0;
  int resident = 1;  ///< blocks at a time
  bool cooperative = false;
  int device = 0;
};
/// Runs all threads of the `number`-th launch; false with `why` if the kernel failed.
bool run_kernel(const EmulatedKernel& kernel, const LaunchShape& shape, uint64_t number,
                const std::vector<char>& arguments, std::string* why);

}  // namespace fake_cuda

struct CUstream_st {
  int device = 0;
  unsigned flags = 0;
  int priority = 0;
  uint64_t id = 0;
  bool legacy = false;
  bool per_thread = false;  ///< the default stream of a thread
  std::shared_ptr<fake_cuda::Queue> queue = std::make_shared<fake_cuda::Queue>();
  fake_cuda::Ticket last;
  std::shared_ptr<fake_cuda::Capture> capture;
  std::vector<CUgraphNode_st*> tail;  ///< what the next captured node depends on
};

/// Of an event that other processes know: how often it was recorded, and the last that is complete.
struct SharedEvent {
  uint64_t recorded;
  uint64_t complete;
};

struct CUevent_st {
  int device = 0;
  unsigned flags = 0;
  fake_cuda::Ticket ticket;  ///< of the last record; null: never recorded
  std::shared_ptr<fake_cuda::Capture> capture;
  std::vector<CUgraphNode_st*> captured;
  SharedEvent* shared = nullptr;
  int fd = -1;
  bool opened = false;  ///< another process's
};

struct CUgraphNode_st {
  fake_cuda::Operation operation;
  std::vector<CUgraphNode_st*> after;
  int index = 0;
};

struct CUgraph_st {
  std::vector<std::shared_ptr<CUgraphNode_st>> nodes;
};

namespace fake_cuda {

struct Capture {
  uint64_t id = 0;
  CUstream_st* origin = nullptr;
  cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
  std::thread::id thread;
  bool invalid = false;
  bool ended = false;
  CUgraph_st* graph = nullptr;
  std::vector<CUstream_st*> streams;
};

/// Nodes with the numbers of those they depend on, in an order that runs.
struct Plan {
  struct Node {
    Operation operation;
    std::vector<int> after;
  };
  std::vector<Node> nodes;
};
void run_plan(const Plan& plan);

}  // namespace fake_cuda

struct CUgraphExec_st {
  std::shared_ptr<const fake_cuda::Plan> plan;
  fake_cuda::Ticket last;
};
