// Streams, their worker threads and events.
#include <algorithm>
#include <chrono>
#include <random>

#include "runtime.h"

namespace fake_cuda {
namespace {

thread_local bool in_host_function = false;

bool can_run(const Task& task) {
  for (const Ticket& ticket : task.after) {
    if (!ticket->done) return false;
  }
  return !task.ready || task.ready();
}

/// The thread of a stream. It is never joined: a process may end while a kernel runs.
void work(std::shared_ptr<Queue> queue) {
  State& s = state();
  Lock lock(s.mutex);
  std::minstd_rand random(static_cast<unsigned>(config().seed * 1000003 + s.next_id++));
  for (;;) {
    if (queue->tasks.empty()) {
      if (queue->closing) return;
      s.changed.wait(lock);
      continue;
    }
    if (!can_run(queue->tasks.front())) {
      if (queue->tasks.front().ready) {  // something of another process, which notifies nobody
        s.changed.wait_for(lock, std::chrono::microseconds(100));
      } else {
        s.changed.wait(lock);
      }
      continue;
    }
    Task task = std::move(queue->tasks.front());
    lock.unlock();
    if (config().jitter_us > 0) {
      const auto longest = std::uniform_int_distribution<long>(0, config().jitter_us)(random);
      std::this_thread::sleep_for(std::chrono::microseconds(longest));
    }
    if (task.run) task.run();
    task.run = nullptr;
    lock.lock();
    queue->tasks.pop_front();
    task.done->done = true;
    task.done->time_ns = now_ns();
    s.changed.notify_all();
  }
}

std::unordered_map<int, CUstream_st*>& streams_of_thread() {
  thread_local std::unordered_map<int, CUstream_st*> streams;
  return streams;
}

CUstream_st* make_stream(unsigned flags, int priority) {
  auto* stream = new CUstream_st;
  stream->device = current_device();
  stream->flags = flags;
  stream->priority = priority;
  stream->id = state().next_id++;
  state().streams.insert(stream);
  return stream;
}

}  // namespace

CUstream_st* resolve(cudaStream_t handle) {
  if (handle == nullptr || handle == cudaStreamLegacy) {
    return state().devices[current_device()].legacy;
  }
  if (handle == cudaStreamPerThread) {
    CUstream_st*& stream = streams_of_thread()[current_device()];
    if (stream == nullptr) {
      stream = make_stream(cudaStreamDefault, 0);
      stream->per_thread = true;
    }
    return stream;
  }
  return state().streams.count(handle) != 0 && !handle->per_thread ? handle : nullptr;
}

Ticket enqueue(CUstream_st* stream, std::function<void()> run, std::vector<Ticket> after,
               std::function<bool()> ready) {
  State& s = state();
  const Ticket& legacy = s.devices[stream->device].legacy->last;
  if (stream->legacy) {
    for (CUstream_st* other : s.streams) {
      if (other->device == stream->device && !(other->flags & cudaStreamNonBlocking) &&
          other->last != nullptr && !other->last->done) {
        after.push_back(other->last);
      }
    }
  } else if (!(stream->flags & cudaStreamNonBlocking) && legacy != nullptr && !legacy->done) {
    after.push_back(legacy);
  }
  stream->last = std::make_shared<Done>();
  Queue& queue = *stream->queue;
  queue.tasks.push_back(Task{std::move(run), std::move(after), std::move(ready), stream->last});
  if (!queue.started) {
    queue.started = true;
    std::thread(work, stream->queue).detach();
  }
  s.changed.notify_all();
  return stream->last;
}

cudaError_t submit(CUstream_st* stream, Operation operation) {
  if (in_host_function) return cudaErrorNotPermitted;
  if (const cudaError_t error = check_legacy(stream); error != cudaSuccess) return error;
  if (stream->capture != nullptr) return add_node(stream, std::move(operation));
  enqueue(stream, std::move(operation.run));
  return cudaSuccess;
}

void wait(Lock& lock, const Ticket& ticket) {
  if (ticket == nullptr) return;
  state().changed.wait(lock, [&] { return ticket->done; });
}

void wait_device(Lock& lock, int device) {
  std::vector<Ticket> all{state().devices[device].legacy->last};
  for (const CUstream_st* stream : state().streams) {
    if (stream->device == device) all.push_back(stream->last);
  }
  std::vector<Ticket>& abandoned = state().devices[device].abandoned;
  all.insert(all.end(), abandoned.begin(), abandoned.end());
  abandoned.clear();
  for (const Ticket& ticket : all) wait(lock, ticket);
}

void run_host_function(cudaHostFn_t function, void* data) {
  in_host_function = true;
  function(data);
  in_host_function = false;
}

namespace {

/// True if nothing is left to do; the default stream answers for the blocking streams too.
bool idle(const CUstream_st& stream) {
  const auto through = [](const CUstream_st& s) { return s.last == nullptr || s.last->done; };
  if (!through(stream)) return false;
  if (!stream.legacy) return true;
  for (const CUstream_st* other : state().streams) {
    if (other->device == stream.device && !(other->flags & cudaStreamNonBlocking) &&
        !through(*other)) {
      return false;
    }
  }
  return true;
}

/// An error for a stream that may not be waited for now.
cudaError_t check_wait(CUstream_st* stream) {
  if (stream == nullptr) return cudaErrorInvalidResourceHandle;
  if (stream->capture != nullptr) {
    invalidate(*stream->capture);
    return cudaErrorStreamCaptureUnsupported;
  }
  if (const cudaError_t error = check_legacy(stream); error != cudaSuccess) return error;
  return unsafe_call();
}

}  // namespace
}  // namespace fake_cuda

using namespace fake_cuda;

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int priority) {
  return device_call("cudaStreamCreateWithPriority", [=](Lock&) {
    if (stream == nullptr || (flags & ~unsigned{cudaStreamNonBlocking})) {
      return cudaErrorInvalidValue;
    }
    *stream = make_stream(flags, std::clamp(priority, -5, 0));
    return cudaSuccess;
  });
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  return cudaStreamCreateWithPriority(stream, flags, 0);
}

cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  return cudaStreamCreateWithPriority(stream, cudaStreamDefault, 0);
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  return device_call("cudaStreamDestroy", [=](Lock&) {
    if (state().streams.count(stream) == 0 || stream->per_thread) {
      return cudaErrorInvalidResourceHandle;
    }
    state().streams.erase(stream);
    if (stream->last != nullptr && !stream->last->done) {
      state().devices[stream->device].abandoned.push_back(stream->last);
    }
    if (stream->capture != nullptr) invalidate(*stream->capture);
    stream->queue->closing = true;  // the worker ends what is queued; the handle stays invalid
    state().changed.notify_all();
    return cudaSuccess;
  });
}

cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
  return device_call("cudaStreamSynchronize", [=](Lock& lock) {
    CUstream_st* stream = resolve(handle);
    if (const cudaError_t error = check_wait(stream); error != cudaSuccess) return error;
    wait(lock, stream->legacy ? enqueue(stream, {}) : stream->last);
    return state().devices[stream->device].broken;
  });
}

cudaError_t cudaStreamQuery(cudaStream_t handle) {
  return device_call("cudaStreamQuery", [=](Lock&) {
    CUstream_st* stream = resolve(handle);
    if (const cudaError_t error = check_wait(stream); error != cudaSuccess) return error;
    return idle(*stream) ? state().devices[stream->device].broken : cudaErrorNotReady;
  });
}

cudaError_t cudaStreamGetFlags(cudaStream_t handle, unsigned* flags) {
  return device_call("cudaStreamGetFlags", [=](Lock&) {
    const CUstream_st* stream = resolve(handle);
    if (stream == nullptr) return cudaErrorInvalidResourceHandle;
    *flags = stream->flags;
    return cudaSuccess;
  });
}

cudaError_t cudaStreamGetPriority(cudaStream_t handle, int* priority) {
  return device_call("cudaStreamGetPriority", [=](Lock&) {
    const CUstream_st* stream = resolve(handle);
    if (stream == nullptr) return cudaErrorInvalidResourceHandle;
    *priority = stream->priority;
    return cudaSuccess;
  });
}

cudaError_t cudaStreamGetDevice(cudaStream_t handle, int* device) {
  return device_call("cudaStreamGetDevice", [=](Lock&) {
    const CUstream_st* stream = resolve(handle);
    if (stream == nullptr) return cudaErrorInvalidResourceHandle;
    *device = stream->device;
    return cudaSuccess;
  });
}

cudaError_t cudaStreamGetId(cudaStream_t handle, unsigned long long* id) {
  return device_call("cudaStreamGetId", [=](Lock&) {
    const CUstream_st* stream = resolve(handle);
    if (stream == nullptr) return cudaErrorInvalidResourceHandle;
    *id = stream->id;
    return cudaSuccess;
  });
}

cudaError_t cudaLaunchHostFunc(cudaStream_t handle, cudaHostFn_t function, void* data) {
  return device_call("cudaLaunchHostFunc", [=](Lock&) {
    CUstream_st* stream = resolve(handle);
    if (stream == nullptr) return cudaErrorInvalidResourceHandle;
    if (function == nullptr) return cudaErrorInvalidValue;
    return submit(stream,
                  Operation{Operation::Kind::kHost, [=] { run_host_function(function, data); }});
  });
}
