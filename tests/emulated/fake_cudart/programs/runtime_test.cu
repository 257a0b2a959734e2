// One program, built by nvcc as any other, that asks the runtime many questions. The first argument
// names the part to run.
#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "kernels.cuh"

namespace {

cudaStream_t make_stream(unsigned flags = cudaStreamNonBlocking) {
  cudaStream_t stream = nullptr;
  OK(cudaStreamCreateWithFlags(&stream, flags));
  return stream;
}
cudaEvent_t make_event(unsigned flags = cudaEventDisableTiming) {
  cudaEvent_t event = nullptr;
  OK(cudaEventCreateWithFlags(&event, flags));
  return event;
}
void hold(cudaStream_t stream, const uint64_t* gate, uint64_t value = 1) {
  wait_flag<<<1, 32, 0, stream>>>(gate, value, nullptr);
  OK(cudaPeekAtLastError());
}
void release(uint64_t* gate, uint64_t value = 1) {
  __atomic_store_n(gate, value, __ATOMIC_SEQ_CST);
}

void kernels() {
  int32_t* data = device_array<int32_t>(100);
  const cudaStream_t stream = make_stream();
  for (int i = 0; i < 5; ++i) scale_add<<<3, 64, 0, stream>>>(data, 1, 0, i);
  scale_add<<<1, 64, 0, stream>>>(data, 100, 2, 1);
  OK(cudaGetLastError());
  Pair pair{data, data + 7, {}};
  pair.extra[29] = 30;
  move_pair<Pair><<<1, 32, 0, stream>>>(pair);
  OK(cudaStreamSynchronize(stream));
  CHECK(value_at(data) == 9 && value_at(data + 99) == 1 && value_at(data + 7) == 39);
  void* arguments[] = {&pair};
  OK(cudaLaunchCooperativeKernel(move_pair<Pair>, 1, 32, arguments, 0, stream));
  cudaLaunchConfig_t config{};
  config.gridDim = 1;
  config.blockDim = 32;
  config.stream = stream;
  OK(cudaLaunchKernelEx(&config, scale_add, data, uint64_t{2}, 3, 0));
  OK(cudaStreamSynchronize(stream));
  CHECK(value_at(data) == 27);
  cudaFuncAttributes attributes{};
  OK(cudaFuncGetAttributes(&attributes, scale_add));
  CHECK(attributes.maxThreadsPerBlock == 1024 && attributes.localSizeBytes == 0);
  const char* name = nullptr;
  OK(cudaFuncGetName(&name, move_pair<Pair>));
  CHECK(std::string(name) == "_Z9move_pairI4PairEvT_");
}

void streams() {
  uint64_t* gate = host_array<uint64_t>(3);
  int32_t* data = device_array<int32_t>(1);
  const cudaStream_t blocking = make_stream(cudaStreamDefault), free_one = make_stream();
  // The default stream waits for the blocking stream, and the next one for the default stream.
  hold(blocking, gate);
  scale_add<<<1, 32, 0, blocking>>>(data, 1, 0, 2);
  scale_add<<<1, 32>>>(data, 1, 10, 5);
  scale_add<<<1, 32, 0, blocking>>>(data, 1, 10, 1);
  GIVES(cudaErrorNotReady, cudaStreamQuery(nullptr));
  GIVES(cudaErrorNotReady, cudaStreamQuery(blocking));
  // A stream that does not block is not held up.
  int32_t* other = host_array<int32_t>(1);
  scale_add<<<1, 32, 0, free_one>>>(other, 1, 0, 4);
  OK(cudaStreamSynchronize(free_one));
  CHECK(other[0] == 4);
  release(gate);
  OK(cudaStreamSynchronize(nullptr));
  OK(cudaStreamSynchronize(blocking));
  CHECK(value_at(data) == 251);
  OK(cudaStreamQuery(nullptr));
  // A callback runs in order, and may not call the runtime.
  cudaError_t inside = cudaSuccess;
  OK(cudaLaunchHostFunc(
      free_one, [](void* out) { *static_cast<cudaError_t*>(out) = cudaMemsetAsync(out, 0, 1, 0); },
      &inside));
  OK(cudaStreamSynchronize(free_one));
  CHECK(inside == cudaErrorNotPermitted || inside == cudaErrorInvalidValue);
  scale_add<<<1, 32, 0, cudaStreamPerThread>>>(data, 1, 0, 8);
  OK(cudaStreamSynchronize(cudaStreamPerThread));
  CHECK(value_at(data) == 8);
  // The work of a destroyed stream is done nevertheless.
  hold(free_one, gate + 1);
  scale_add<<<1, 32, 0, free_one>>>(data, 1, 0, 77);
  OK(cudaStreamDestroy(free_one));
  release(gate + 1);
  OK(cudaDeviceSynchronize());
  CHECK(value_at(data) == 77);
  int priority = 1, least = 1, greatest = 1;
  OK(cudaDeviceGetStreamPriorityRange(&least, &greatest));
  cudaStream_t urgent = nullptr;
  OK(cudaStreamCreateWithPriority(&urgent, cudaStreamNonBlocking, greatest));
  OK(cudaStreamGetPriority(urgent, &priority));
  CHECK(least == 0 && priority == greatest && greatest < 0);
}

void events() {
  uint64_t* gate = host_array<uint64_t>(2);
  int32_t* data = device_array<int32_t>(1);
  const cudaStream_t a = make_stream(), b = make_stream();
  const cudaEvent_t event = make_event();
  OK(cudaEventQuery(event));  // never recorded
  OK(cudaStreamWaitEvent(b, event));
  hold(a, gate);
  scale_add<<<1, 32, 0, a>>>(data, 1, 0, 3);
  OK(cudaEventRecord(event, a));
  OK(cudaStreamWaitEvent(b, event));
  scale_add<<<1, 32, 0, b>>>(data, 1, 10, 0);
  // b waits for the record that was last when it was told to wait.
  hold(a, gate + 1);
  OK(cudaEventRecord(event, a));
  GIVES(cudaErrorNotReady, cudaEventQuery(event));
  GIVES(cudaErrorNotReady, cudaStreamQuery(b));
  release(gate);
  OK(cudaStreamSynchronize(b));
  CHECK(value_at(data) == 30);
  GIVES(cudaErrorNotReady, cudaEventQuery(event));
  release(gate + 1);
  OK(cudaEventSynchronize(event));
  OK(cudaEventQuery(event));
  const cudaEvent_t start = make_event(cudaEventDefault), end = make_event(cudaEventDefault);
  OK(cudaEventRecord(start, a));
  OK(cudaLaunchHostFunc(a, [](void*) { usleep(20000); }, nullptr));
  OK(cudaEventRecord(end, a));
  OK(cudaEventSynchronize(end));
  float ms = 0;
  OK(cudaEventElapsedTime(&ms, start, end));
  CHECK(ms >= 19 && ms < 10000);
  GIVES(cudaErrorInvalidResourceHandle, cudaEventElapsedTime(&ms, event, end));
}

cudaGraphExec_t instantiate(cudaGraph_t graph) {
  cudaGraphExec_t executable = nullptr;
  OK(cudaGraphInstantiate(&executable, graph));
  OK(cudaGraphDestroy(graph));
  return executable;
}

void capture() {
  int32_t* data = device_array<int32_t>(4);
  int32_t* pinned = host_array<int32_t>(1);
  const cudaStream_t a = make_stream(), b = make_stream();
  const cudaEvent_t fork = make_event(), join = make_event();
  cudaGraph_t graph = nullptr;
  OK(cudaStreamBeginCapture(a, cudaStreamCaptureModeGlobal));
  scale_add<<<1, 32, 0, a>>>(data, 1, 1, 1);
  OK(cudaEventRecord(fork, a));
  OK(cudaStreamWaitEvent(b, fork));  // b joins the capture
  cudaStreamCaptureStatus status{};
  unsigned long long id_a = 0, id_b = 1;
  OK(cudaStreamIsCapturing(b, &status));
  CHECK(status == cudaStreamCaptureStatusActive);
  OK(cudaStreamGetCaptureInfo(a, &status, &id_a));
  OK(cudaStreamGetCaptureInfo(b, &status, &id_b));
  CHECK(id_a == id_b);
  scale_add<<<1, 32, 0, b>>>(data, 1, 2, 0);
  scale_add<<<1, 32, 0, a>>>(data + 1, 1, 1, 1);
  OK(cudaEventRecord(join, b));
  OK(cudaStreamWaitEvent(a, join));
  OK(cudaMemcpyAsync(pinned, data, 4, cudaMemcpyDeviceToHost, a));
  OK(cudaMemsetAsync(data + 2, 0, 4, a));
  OK(cudaStreamEndCapture(a, &graph));
  OK(cudaStreamIsCapturing(b, &status));
  CHECK(status == cudaStreamCaptureStatusNone);
  size_t nodes = 0;
  OK(cudaGraphGetNodes(graph, nullptr, &nodes));
  CHECK(nodes == 5);
  CHECK(value_at(data) == 0);  // nothing ran so far
  cudaGraphExec_t executable = instantiate(graph);
  for (int i = 0; i < 4; ++i) OK(cudaGraphLaunch(executable, a));
  OK(cudaGraphExecDestroy(executable));
  OK(cudaStreamSynchronize(a));
  CHECK(value_at(data) == 30 && value_at(data + 1) == 4 && pinned[0] == 30);
  // The stream works as before.
  scale_add<<<1, 32, 0, b>>>(data, 1, 0, 6);
  OK(cudaStreamSynchronize(b));
  CHECK(value_at(data) == 6);
}

/// Begins a capture, makes `mistake`, and expects that the capture fails.
template <class Mistake>
void spoiled(cudaStream_t stream, cudaStreamCaptureMode mode, Mistake mistake,
             cudaError_t at_end = cudaErrorStreamCaptureInvalidated) {
  cudaGraph_t graph = nullptr;
  OK(cudaStreamBeginCapture(stream, mode));
  mistake();
  GIVES(at_end, cudaStreamEndCapture(stream, &graph));
  CHECK(graph == nullptr);
}

void capture_errors() {
  constexpr auto kUnsupported = cudaErrorStreamCaptureUnsupported;
  int32_t* data = device_array<int32_t>(4);
  const cudaStream_t a = make_stream(), b = make_stream(), blocking = make_stream(0);
  const cudaEvent_t event = make_event(), outside = make_event();
  OK(cudaEventRecord(outside, b));
  OK(cudaStreamSynchronize(b));
  const auto relaxed = cudaStreamCaptureModeRelaxed, global = cudaStreamCaptureModeGlobal;
  GIVES(kUnsupported, cudaStreamBeginCapture(nullptr, relaxed));
  spoiled(a, relaxed, [&] { GIVES(kUnsupported, cudaStreamSynchronize(a)); });
  spoiled(a, relaxed, [&] { GIVES(kUnsupported, cudaStreamQuery(a)); });
  void* memory = nullptr;
  spoiled(a, global, [&] { GIVES(kUnsupported, cudaMalloc(&memory, 4)); });
  spoiled(a, global, [&] { GIVES(kUnsupported, cudaDeviceSynchronize()); });
  spoiled(a, global, [&] { GIVES(kUnsupported, cudaStreamSynchronize(b)); });
  spoiled(a, global, [&] { GIVES(kUnsupported, cudaEventQuery(outside)); });
  // From another thread too, where the capture is global and that thread does not know better.
  spoiled(a, global,
          [&] { std::thread([&] { GIVES(kUnsupported, cudaEventQuery(outside)); }).join(); });
  const auto works = [&](cudaStreamCaptureMode mode, auto body) {
    spoiled(a, mode, body, cudaErrorStreamCaptureUnjoined);
  };
  // The ends of these captures fail for work that was not joined, and for nothing else.
  const auto unjoined = [&] {
    OK(cudaEventRecord(event, a));
    OK(cudaStreamWaitEvent(b, event));
    scale_add<<<1, 32, 0, b>>>(data, 1, 1, 1);
    OK(cudaPeekAtLastError());
  };
  works(global, unjoined);
  works(relaxed, [&] {
    OK(cudaEventQuery(outside));
    OK(cudaMalloc(&memory, 4));
    unjoined();
  });
  works(global, [&] {
    std::thread([&] {
      cudaStreamCaptureMode mode = relaxed;
      OK(cudaThreadExchangeStreamCaptureMode(&mode));
      OK(cudaEventQuery(outside));
    }).join();
    unjoined();
  });
  works(cudaStreamCaptureModeThreadLocal, [&] {
    std::thread([&] { OK(cudaEventQuery(outside)); }).join();
    unjoined();
  });
  spoiled(a, relaxed,
          [&] { GIVES(cudaErrorStreamCaptureIsolation, cudaStreamWaitEvent(a, outside)); });
  spoiled(a, relaxed, [&] {
    OK(cudaEventRecord(event, a));
    GIVES(cudaErrorCapturedEvent, cudaEventQuery(event));
  });
  spoiled(blocking, relaxed, [&] {
    scale_add<<<1, 32>>>(data, 1, 1, 1);
    GIVES(cudaErrorStreamCaptureImplicit, cudaGetLastError());
  });
  spoiled(a, relaxed, [&] {
    char pageable[4];
    GIVES(kUnsupported, cudaMemcpyAsync(data, pageable, 4, cudaMemcpyHostToDevice, a));
  });
  spoiled(a, relaxed, [&] {
    spoiled(b, relaxed, [&] {
      OK(cudaEventRecord(event, a));
      GIVES(cudaErrorStreamCaptureMerge, cudaStreamWaitEvent(b, event));
    });
  });
  // An event that stems from a capture is of no use outside.
  spoiled(
      a, relaxed,
      [&] {
        OK(cudaEventRecord(event, a));
        unjoined();
      },
      cudaErrorStreamCaptureUnjoined);
  GIVES(cudaErrorCapturedEvent, cudaStreamWaitEvent(b, event));
  GIVES(cudaErrorCapturedEvent, cudaEventSynchronize(event));
  cudaGraph_t graph = nullptr;
  GIVES(cudaErrorIllegalState, cudaStreamEndCapture(a, &graph));
  OK(cudaStreamBeginCapture(a, global));
  std::thread([&] {
    GIVES(cudaErrorStreamCaptureWrongThread, cudaStreamEndCapture(a, &graph));
  }).join();
  OK(cudaStreamEndCapture(a, &graph));
  OK(cudaGraphDestroy(graph));
  GIVES(cudaErrorInvalidValue, cudaGraphDestroy(graph));
}

void cooperative() {  // FAKE_CUDA_SMS=3
  int per_sm = 0;
  OK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_sm, grid_meet, 512, 0));
  CHECK(per_sm == 2);  // 64 registers a thread
  uint64_t* flags = device_array<uint64_t>(8);
  uint32_t blocks = 6;
  uint64_t value = 1;
  void* arguments[] = {&flags, &blocks, &value};
  OK(cudaLaunchCooperativeKernel(grid_meet, 6, 512, arguments, 0, 0));
  OK(cudaDeviceSynchronize());
  GIVES(cudaErrorCooperativeLaunchTooLarge,
        cudaLaunchCooperativeKernel(grid_meet, 7, 512, arguments, 0, 0));
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = 7;
  config.blockDim = 512;
  config.attrs = &attribute;
  config.numAttrs = 1;
  GIVES(cudaErrorCooperativeLaunchTooLarge,
        cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(grid_meet), arguments));
  GIVES(cudaErrorLaunchOutOfResources, cudaLaunchKernel(grid_meet, 1, 1024, arguments, 0, 0));
  // An ordinary launch of seven blocks is accepted, and hangs: the seventh never becomes resident.
  blocks = 7;
  value = 2;
  OK(cudaLaunchKernel(grid_meet, 7, 512, arguments, 0, 0));
  const cudaError_t error = cudaDeviceSynchronize();
  CHECK(error == cudaErrorLaunchTimeout);
  CHECK(cudaGetLastError() == error && cudaFree(flags) == error);  // for good
}

void memory() {
  unsigned char* data = nullptr;
  OK(cudaMalloc(&data, 1000));
  CHECK(reinterpret_cast<uintptr_t>(data) % 256 == 0);
  unsigned char host[1001];
  OK(cudaMemcpy(host, data, 1000, cudaMemcpyDeviceToHost));
  for (int i = 0; i < 1000; ++i) CHECK(host[i] == 0xfb);
  GIVES(cudaErrorInvalidValue, cudaMemcpy(host, data, 1001, cudaMemcpyDeviceToHost));
  GIVES(cudaErrorInvalidValue, cudaMemcpy(host, data + 1, 1000, cudaMemcpyDeviceToHost));
  GIVES(cudaErrorInvalidValue, cudaMemcpy(data, host, 10, cudaMemcpyDeviceToHost));
  GIVES(cudaErrorInvalidValue, cudaMemset(data + 999, 0, 2));
  GIVES(cudaErrorInvalidValue, cudaMemset(host, 0, 2));
  GIVES(cudaErrorInvalidValue, cudaMemcpy(nullptr, data, 1, cudaMemcpyDefault));
  cudaPointerAttributes attributes{};
  OK(cudaPointerGetAttributes(&attributes, data + 999));
  CHECK(attributes.type == cudaMemoryTypeDevice && attributes.device == 0);
  OK(cudaPointerGetAttributes(&attributes, host));
  CHECK(attributes.type == cudaMemoryTypeUnregistered);
  // Pageable memory is read before the call returns, pinned memory when its turn comes.
  const cudaStream_t stream = make_stream();
  uint64_t* gate = host_array<uint64_t>(1);
  unsigned char* pinned = host_array<unsigned char>(2);
  OK(cudaPointerGetAttributes(&attributes, pinned));
  CHECK(attributes.type == cudaMemoryTypeHost && attributes.devicePointer == pinned);
  hold(stream, gate);
  host[0] = pinned[0] = 1;
  OK(cudaMemcpyAsync(data, host, 1, cudaMemcpyHostToDevice, stream));
  OK(cudaMemcpyAsync(data + 1, pinned, 1, cudaMemcpyHostToDevice, stream));
  host[0] = pinned[0] = 2;
  release(gate);
  OK(cudaStreamSynchronize(stream));
  CHECK(value_at(data) == 1 && value_at(data + 1) == 2);
  size_t left = 0, all = 0;
  OK(cudaMemGetInfo(&left, &all));
  CHECK(all - left == 1000);
  OK(cudaSetDevice(1));
  void* there = nullptr;
  OK(cudaMalloc(&there, 16));
  OK(cudaMemcpyPeer(there, 1, data, 0, 2));
  CHECK(value_at(static_cast<unsigned char*>(there) + 1) == 2);
  OK(cudaFree(there));
  GIVES(cudaErrorMemoryAllocation, cudaMalloc(&there, all + 1));
  CHECK(there == nullptr);
  OK(cudaSetDevice(0));
  OK(cudaFree(nullptr));
  OK(cudaFree(data));
  GIVES(cudaErrorInvalidValue, cudaFree(data));  // the report tells of it
  GIVES(cudaErrorInvalidValue, cudaFree(pinned));
  OK(cudaFreeHost(pinned));
  OK(cudaMalloc(&data, 10));
  data[10] = 0;  // a byte too many: the report tells of it
  OK(cudaFree(data));
}

/// A kernel that leaves its memory.
void fault() {
  int32_t* data = device_array<int32_t>(4);
  scale_add<<<1, 32>>>(data, 5, 1, 1);
  const cudaError_t error = cudaDeviceSynchronize();
  CHECK(error == cudaErrorIllegalAddress);
  GIVES(error, cudaGetLastError());
  GIVES(error, cudaFree(data));  // for good
  OK(cudaSetDevice(1));          // the other devices work
  OK(cudaMalloc(&data, 4));
}

void errors() {
  const cudaStream_t gone = make_stream();
  const cudaEvent_t lost = make_event();
  OK(cudaStreamDestroy(gone));
  OK(cudaEventDestroy(lost));
  constexpr auto kHandle = cudaErrorInvalidResourceHandle;
  GIVES(kHandle, cudaStreamDestroy(gone));
  GIVES(kHandle, cudaStreamSynchronize(gone));
  GIVES(kHandle, cudaEventDestroy(lost));
  GIVES(kHandle, cudaEventRecord(lost, nullptr));
  GIVES(kHandle, cudaStreamSynchronize(reinterpret_cast<cudaStream_t>(0x1234)));
  int32_t* data = device_array<int32_t>(1);
  scale_add<<<1, 32, 0, gone>>>(data, 1, 1, 1);
  CHECK(cudaPeekAtLastError() == kHandle && cudaGetLastError() == kHandle);
  CHECK(cudaGetLastError() == cudaSuccess);
  scale_add<<<0, 32>>>(data, 1, 1, 1);
  GIVES(cudaErrorInvalidConfiguration, cudaGetLastError());
  scale_add<<<1, 2048>>>(data, 1, 1, 1);
  GIVES(cudaErrorInvalidConfiguration, cudaGetLastError());
  scale_add<<<1, 32, 100 << 10>>>(data, 1, 1, 1);
  GIVES(cudaErrorInvalidValue, cudaGetLastError());
  OK(cudaFuncSetAttribute(scale_add, cudaFuncAttributeMaxDynamicSharedMemorySize, 100 << 10));
  scale_add<<<1, 32, 100 << 10>>>(data, 1, 1, 1);
  OK(cudaGetLastError());
  GIVES(cudaErrorInvalidDevice, cudaSetDevice(4));
  GIVES(cudaErrorInvalidDevice, cudaDeviceEnablePeerAccess(0, 0));
  OK(cudaDeviceEnablePeerAccess(1, 0));
  GIVES(cudaErrorPeerAccessAlreadyEnabled, cudaDeviceEnablePeerAccess(1, 0));
  const cudaStream_t on_zero = make_stream();
  const cudaEvent_t event = make_event();
  OK(cudaSetDevice(1));
  scale_add<<<1, 32, 0, on_zero>>>(data, 1, 1, 1);
  GIVES(kHandle, cudaGetLastError());
  GIVES(kHandle, cudaEventRecord(event, make_stream()));
  OK(cudaEventRecord(event, on_zero));
  int device = -1;
  std::thread([&] { OK(cudaGetDevice(&device)); }).join();
  CHECK(device == 0);  // each thread has its own
  CHECK(std::string(cudaGetErrorName(cudaErrorNoDevice)) == "cudaErrorNoDevice");
  CHECK(std::strlen(cudaGetErrorString(cudaErrorNoDevice)) > 0);
}

void devices() {
  int count = 0, version = 0, value = 0;
  OK(cudaGetDeviceCount(&count));
  OK(cudaDriverGetVersion(&version));
  OK(cudaRuntimeGetVersion(&value));
  CHECK(version == 13000 && value == CUDART_VERSION);
  cudaDeviceProp p{}, q{};
  OK(cudaGetDeviceProperties(&p, 0));
  OK(cudaGetDeviceProperties(&q, count - 1));
  CHECK(std::string(p.name) == "host emulation" && p.major == 9 && p.cooperativeLaunch == 1);
  CHECK(count == 1 || std::memcmp(&p.uuid, &q.uuid, sizeof(p.uuid)) != 0);
  OK(cudaDeviceGetAttribute(&value, cudaDevAttrMultiProcessorCount, 0));
  std::printf("%d devices, %d SMs, first on bus %d\n", count, value, p.pciBusID);
}

void peers() {
  // Kernels of two devices wait for each other: as launches, and as branches of one graph.
  uint64_t* flags[2];
  cudaStream_t streams[2];
  cudaEvent_t events[2];
  for (int d = 0; d < 2; ++d) {
    OK(cudaSetDevice(d));
    flags[d] = device_array<uint64_t>(1);
    streams[d] = make_stream();
    events[d] = make_event();
  }
  const auto both = [&](uint64_t value) {
    for (int d = 0; d < 2; ++d) {
      OK(cudaSetDevice(d));
      meet<<<1, 64, 0, streams[d]>>>(flags[1 - d], flags[d], value);
      OK(cudaGetLastError());
    }
  };
  both(1);
  for (cudaStream_t stream : streams) OK(cudaStreamSynchronize(stream));
  cudaGraph_t graph = nullptr;
  OK(cudaSetDevice(0));
  OK(cudaStreamBeginCapture(streams[0], cudaStreamCaptureModeGlobal));
  OK(cudaEventRecord(events[0], streams[0]));
  OK(cudaStreamWaitEvent(streams[1], events[0]));
  both(2);
  OK(cudaEventRecord(events[1], streams[1]));
  OK(cudaStreamWaitEvent(streams[0], events[1]));
  OK(cudaStreamEndCapture(streams[0], &graph));
  cudaGraphExec_t executable = instantiate(graph);
  for (int i = 0; i < 3; ++i) {
    OK(cudaGraphLaunch(executable, streams[0]));
    OK(cudaStreamSynchronize(streams[0]));
    CHECK(value_at(flags[0]) == 2);
    OK(cudaSetDevice(1));
    OK(cudaMemset(flags[0], 0, 8));
    OK(cudaMemset(flags[1], 0, 8));
    OK(cudaDeviceSynchronize());
    OK(cudaSetDevice(0));
    OK(cudaDeviceSynchronize());
  }
}

void forked() {
  int32_t* data = device_array<int32_t>(1);
  uint64_t* gate = host_array<uint64_t>(1);
  hold(make_stream(), gate);
  const pid_t child = fork();
  if (child == 0) {
    int count = 0;
    void* memory = nullptr;
    GIVES(cudaErrorInitializationError, cudaGetDeviceCount(&count));
    GIVES(cudaErrorInitializationError, cudaMalloc(&memory, 4));
    GIVES(cudaErrorInitializationError, cudaDeviceSynchronize());
    std::exit(7);
  }
  int status = 0;
  CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 7);
  scale_add<<<1, 32>>>(data, 1, 0, 5);
  OK(cudaStreamSynchronize(nullptr));
  CHECK(value_at(data) == 5);
  release(gate);
  OK(cudaDeviceSynchronize());
}

/// A kernel runs, and more work waits, when the process ends.
void leave() {
  uint64_t* gate = host_array<uint64_t>(1);
  int32_t* data = device_array<int32_t>(1);
  const cudaStream_t stream = make_stream();
  hold(stream, gate);
  scale_add<<<1, 32, 0, stream>>>(data, 1, 0, 5);
}

/// Two processes, each with memory that the other opens; their kernels wait for each other.
struct Hello {
  cudaIpcMemHandle_t memory;
  cudaIpcEventHandle_t event;
};
void ipc_rank(int rank, int in, int out) {
  OK(cudaSetDevice(rank));
  uint64_t* mine = device_array<uint64_t>(100);
  const cudaStream_t stream = make_stream();
  const cudaEvent_t event = make_event(cudaEventDisableTiming | cudaEventInterprocess);
  Hello hello{}, from{};
  OK(cudaIpcGetMemHandle(&hello.memory, mine));
  OK(cudaIpcGetEventHandle(&hello.event, event));
  GIVES(cudaErrorInvalidValue, cudaIpcGetMemHandle(&from.memory, mine + 1));
  CHECK(write(out, &hello, sizeof(hello)) == sizeof(hello));
  CHECK(read(in, &from, sizeof(from)) == sizeof(from));
  void* opened = nullptr;
  constexpr unsigned kFlags = cudaIpcMemLazyEnablePeerAccess;
  GIVES(cudaErrorDeviceUninitialized, cudaIpcOpenMemHandle(&opened, hello.memory, kFlags));
  GIVES(cudaErrorInvalidValue, cudaIpcOpenMemHandle(&opened, from.memory, 0));
  OK(cudaIpcOpenMemHandle(&opened, from.memory, kFlags));
  auto* theirs = static_cast<uint64_t*>(opened);
  for (uint64_t i = 1; i <= 50; ++i) meet<<<1, 64, 0, stream>>>(theirs, mine, i);
  OK(cudaGetLastError());
  OK(cudaStreamSynchronize(stream));
  CHECK(value_at(mine) == 50);
  // Rank 0 writes to rank 1's memory and records; rank 1 reads behind the event.
  cudaEvent_t other = nullptr;
  OK(cudaIpcOpenEventHandle(&other, from.event));
  char token = 0;
  if (rank == 0) {
    OK(cudaLaunchHostFunc(stream, [](void*) { usleep(50000); }, nullptr));
    OK(cudaMemsetAsync(theirs + 7, 0x11, 8, stream));
    OK(cudaEventRecord(event, stream));
    CHECK(write(out, &token, 1) == 1);
    OK(cudaStreamSynchronize(stream));
  } else {
    CHECK(read(in, &token, 1) == 1);
    OK(cudaStreamWaitEvent(stream, other));
    uint64_t* copy = host_array<uint64_t>(1);
    OK(cudaMemcpyAsync(copy, mine + 7, 8, cudaMemcpyDeviceToHost, stream));
    OK(cudaStreamSynchronize(stream));
    CHECK(copy[0] == 0x1111111111111111);
  }
  void* again = nullptr;
  OK(cudaIpcOpenMemHandle(&again, from.memory, kFlags));
  CHECK(again == opened);
  OK(cudaIpcCloseMemHandle(opened));
  CHECK(value_at(theirs) == 50);
  OK(cudaIpcCloseMemHandle(opened));
  GIVES(cudaErrorInvalidValue, cudaIpcCloseMemHandle(opened));
  CHECK(write(out, &token, 1) == 1 && read(in, &token, 1) == 1);
  OK(cudaFree(mine));
  mine = device_array<uint64_t>(100);  // other memory, where the handle's was
  CHECK(write(out, &token, 1) == 1 && read(in, &token, 1) == 1);
  GIVES(cudaErrorMapBufferObjectFailed, cudaIpcOpenMemHandle(&opened, from.memory, kFlags));
  CHECK(write(out, &token, 1) == 1 && read(in, &token, 1) == 1);
  OK(cudaFree(mine));
  OK(cudaEventDestroy(other));
  OK(cudaEventDestroy(event));
  OK(cudaStreamDestroy(stream));
}

void ipc() {
  int to_child[2], to_parent[2];
  CHECK(pipe(to_child) == 0 && pipe(to_parent) == 0);
  const pid_t child = fork();           // before the runtime is used
  close(to_child[child == 0 ? 1 : 0]);  // so that the end of one ends the other's read
  close(to_parent[child == 0 ? 0 : 1]);
  if (child == 0) {
    ipc_rank(1, to_child[0], to_parent[1]);
    std::exit(0);
  }
  ipc_rank(0, to_parent[0], to_child[1]);
  int status = 0;
  CHECK(waitpid(child, &status, 0) == child && status == 0);
}

const struct {
  const char* name;
  void (*run)();
} kParts[] = {
    {"kernels", kernels},
    {"streams", streams},
    {"events", events},
    {"capture", capture},
    {"capture_errors", capture_errors},
    {"cooperative", cooperative},
    {"memory", memory},
    {"errors", errors},
    {"devices", devices},
    {"peers", peers},
    {"forked", forked},
    {"leave", leave},
    {"ipc", ipc},
    {"fault", fault},
};

}  // namespace

int main(int count, char** arguments) {
  for (const auto& part : kParts) {
    if (count == 2 && std::strcmp(arguments[1], part.name) == 0) {
      part.run();
      std::printf("ok\n");
      return 0;
    }
  }
  std::printf("no such part\n");
  return 2;
}
