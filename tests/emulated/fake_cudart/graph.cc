// Capture of streams into graphs, and their replay.
#include <algorithm>
#include <unordered_set>

#include "runtime.h"

namespace fake_cuda {
namespace {

thread_local cudaStreamCaptureMode mode_of_thread = cudaStreamCaptureModeGlobal;

void add_unique(std::vector<CUgraphNode_st*>& to, const std::vector<CUgraphNode_st*>& nodes) {
  for (CUgraphNode_st* node : nodes) {
    if (std::find(to.begin(), to.end(), node) == to.end()) to.push_back(node);
  }
}

void join(Capture& capture, CUstream_st* stream, const std::shared_ptr<Capture>& shared) {
  stream->capture = shared;
  capture.streams.push_back(stream);
}

/// Ends the capture: its streams are ordinary ones again.
void leave(Capture& capture) {
  capture.ended = true;
  for (CUstream_st* stream : capture.streams) {
    stream->capture = nullptr;
    stream->tail.clear();
  }
  auto& all = state().captures;
  all.erase(std::remove_if(all.begin(), all.end(), [&](auto& c) { return c.get() == &capture; }),
            all.end());
}

/// Nodes that `tail` does not wait for, directly or indirectly.
size_t unjoined(const CUgraph_st& graph, const std::vector<CUgraphNode_st*>& tail) {
  std::unordered_set<const CUgraphNode_st*> reached;
  std::vector<const CUgraphNode_st*> pending(tail.begin(), tail.end());
  while (!pending.empty()) {
    const CUgraphNode_st* node = pending.back();
    pending.pop_back();
    if (!reached.insert(node).second) continue;
    pending.insert(pending.end(), node->after.begin(), node->after.end());
  }
  return graph.nodes.size() - reached.size();
}

CUgraph_st* make_graph() {
  auto* graph = new CUgraph_st;
  state().graphs.insert(graph);
  return graph;
}

void drop_graph(CUgraph_st* graph) {
  state().graphs.erase(graph);
  graph->nodes.clear();  // the handle stays invalid
}

/// The capture with a stream that the default stream `stream` would wait for, or null.
Capture* meets_capture(const CUstream_st* stream) {
  if (!stream->legacy) return nullptr;
  for (const auto& capture : state().captures) {
    for (const CUstream_st* other : capture->streams) {
      if (other->device == stream->device && !(other->flags & cudaStreamNonBlocking)) {
        return capture.get();
      }
    }
  }
  return nullptr;
}

}  // namespace

void invalidate(Capture& capture) { capture.invalid = true; }

cudaError_t unsafe_call() {
  if (mode_of_thread == cudaStreamCaptureModeRelaxed) return cudaSuccess;
  cudaError_t error = cudaSuccess;
  for (const auto& capture : state().captures) {
    const bool own = capture->thread == std::this_thread::get_id();
    const bool met = own ? capture->mode != cudaStreamCaptureModeRelaxed
                         : mode_of_thread == cudaStreamCaptureModeGlobal &&
                               capture->mode == cudaStreamCaptureModeGlobal;
    if (met) {
      invalidate(*capture);
      error = cudaErrorStreamCaptureUnsupported;
    }
  }
  return error;
}

cudaError_t check_legacy(CUstream_st* stream) {
  Capture* capture = meets_capture(stream);
  if (capture == nullptr) return cudaSuccess;
  invalidate(*capture);
  return cudaErrorStreamCaptureImplicit;
}

cudaError_t add_node(CUstream_st* stream, Operation operation) {
  Capture& capture = *stream->capture;
  if (capture.invalid) return cudaErrorStreamCaptureInvalidated;
  auto node = std::make_shared<CUgraphNode_st>();
  node->operation = std::move(operation);
  node->after = stream->tail;
  node->index = static_cast<int>(capture.graph->nodes.size());
  stream->tail = {node.get()};
  capture.graph->nodes.push_back(std::move(node));
  return cudaSuccess;
}

cudaError_t record_in_capture(CUstream_st* stream, CUevent_st* event) {
  if (stream->capture->invalid) return cudaErrorStreamCaptureInvalidated;
  if (event->flags & cudaEventInterprocess) {
    invalidate(*stream->capture);
    return cudaErrorStreamCaptureUnsupported;
  }
  event->capture = stream->capture;
  event->captured = stream->tail;
  return cudaSuccess;
}

cudaError_t wait_in_capture(CUstream_st* stream, CUevent_st* event) {
  if (event->capture == nullptr) {
    invalidate(*stream->capture);
    return cudaErrorStreamCaptureIsolation;
  }
  if (event->capture->ended) {
    if (stream->capture == nullptr) return cudaErrorCapturedEvent;
    invalidate(*stream->capture);
    return cudaErrorStreamCaptureIsolation;
  }
  if (event->capture->invalid) return cudaErrorStreamCaptureInvalidated;
  if (stream->capture == nullptr) {
    if (stream->legacy) {
      invalidate(*event->capture);
      return cudaErrorStreamCaptureImplicit;
    }
    join(*event->capture, stream, event->capture);
  } else if (stream->capture != event->capture) {
    invalidate(*stream->capture);
    invalidate(*event->capture);
    return cudaErrorStreamCaptureMerge;
  }
  add_unique(stream->tail, event->captured);
  return cudaSuccess;
}

namespace {

/// The work of one launch of a graph: nodes that do not wait for each other run at the same time,
/// for kernels of several devices may wait for each other.
class Replay {
 public:
  explicit Replay(const Plan& plan) : plan_(plan), missing_(plan.nodes.size()) {
    for (size_t i = 0; i < plan.nodes.size(); ++i) {
      missing_[i] = plan.nodes[i].after.size();
      if (missing_[i] == 0) ready_.push_back(i);
    }
  }

  void run() {
    Lock lock(mutex_);
    while (finished_ < plan_.nodes.size()) {
      if (ready_.empty()) {
        changed_.wait(lock);
        continue;
      }
      while (ready_.size() > 1) {
        helpers_.emplace_back([this, node = take()] { execute(node); });
      }
      const size_t node = take();
      lock.unlock();
      execute(node);
      lock.lock();
    }
    lock.unlock();
    for (std::thread& helper : helpers_) helper.join();
  }

 private:
  size_t take() {
    const size_t node = ready_.back();
    ready_.pop_back();
    return node;
  }

  void execute(size_t node) {
    if (plan_.nodes[node].operation.run) plan_.nodes[node].operation.run();
    const Lock lock(mutex_);
    ++finished_;
    for (size_t i = node + 1; i < plan_.nodes.size(); ++i) {
      for (const int before : plan_.nodes[i].after) {
        if (before == static_cast<int>(node) && --missing_[i] == 0) ready_.push_back(i);
      }
    }
    changed_.notify_all();
  }

  const Plan& plan_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<size_t> missing_;
  std::vector<size_t> ready_;
  std::vector<std::thread> helpers_;
  size_t finished_ = 0;
};

std::shared_ptr<const Plan> make_plan(const CUgraph_st& graph) {
  auto plan = std::make_shared<Plan>();
  for (const auto& node : graph.nodes) {
    Plan::Node made{node->operation, {}};
    for (const CUgraphNode_st* before : node->after) made.after.push_back(before->index);
    plan->nodes.push_back(std::move(made));
  }
  return plan;
}

cudaError_t begin(CUstream_st* stream, cudaStreamCaptureMode mode) {
  if (stream == nullptr) return cudaErrorInvalidResourceHandle;
  if (static_cast<unsigned>(mode) > cudaStreamCaptureModeRelaxed) return cudaErrorInvalidValue;
  if (stream->legacy) return cudaErrorStreamCaptureUnsupported;
  if (stream->capture != nullptr) return cudaErrorIllegalState;
  auto capture = std::make_shared<Capture>();
  capture->id = state().next_id++;
  capture->origin = stream;
  capture->mode = mode;
  capture->thread = std::this_thread::get_id();
  capture->graph = make_graph();
  join(*capture, stream, capture);
  state().captures.push_back(std::move(capture));
  return cudaSuccess;
}

cudaError_t end(CUstream_st* stream, cudaGraph_t* graph) {
  if (stream == nullptr) return cudaErrorInvalidResourceHandle;
  if (graph == nullptr) return cudaErrorInvalidValue;
  *graph = nullptr;
  const std::shared_ptr<Capture> capture = stream->capture;
  if (capture == nullptr) return cudaErrorIllegalState;
  if (capture->origin != stream) {
    invalidate(*capture);
    return cudaErrorStreamCaptureUnmatched;
  }
  if (capture->mode != cudaStreamCaptureModeRelaxed &&
      capture->thread != std::this_thread::get_id()) {
    return cudaErrorStreamCaptureWrongThread;
  }
  cudaError_t error = cudaSuccess;
  if (capture->invalid) {
    error = cudaErrorStreamCaptureInvalidated;
  } else if (unjoined(*capture->graph, stream->tail) != 0) {
    error = cudaErrorStreamCaptureUnjoined;
  }
  leave(*capture);
  if (error != cudaSuccess) {
    drop_graph(capture->graph);
  } else {
    *graph = capture->graph;
  }
  return error;
}

}  // namespace

void run_plan(const Plan& plan) { Replay(plan).run(); }

}  // namespace fake_cuda

using namespace fake_cuda;

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
  return device_call("cudaStreamBeginCapture", [=](Lock&) { return begin(resolve(stream), mode); });
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  return device_call("cudaStreamEndCapture", [=](Lock&) { return end(resolve(stream), graph); });
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  return cudaStreamGetCaptureInfo(stream, status, nullptr, nullptr, nullptr, nullptr, nullptr);
}

cudaError_t cudaStreamGetCaptureInfo(cudaStream_t handle, cudaStreamCaptureStatus* status,
                                     unsigned long long* id, cudaGraph_t* graph,
                                     const cudaGraphNode_t** dependencies,
                                     const cudaGraphEdgeData** edges, size_t* count) {
  return device_call("cudaStreamGetCaptureInfo", [=](Lock&) {
    CUstream_st* stream = resolve(handle);
    if (stream == nullptr) return cudaErrorInvalidResourceHandle;
    if (status == nullptr) return cudaErrorInvalidValue;
    *status = cudaStreamCaptureStatusNone;
    // Asking does no harm to the captures that stand in the default stream's way.
    if (meets_capture(stream) != nullptr) return cudaErrorStreamCaptureImplicit;
    const Capture* capture = stream->capture.get();
    if (capture == nullptr) return cudaSuccess;
    *status = capture->invalid ? cudaStreamCaptureStatusInvalidated : cudaStreamCaptureStatusActive;
    if (capture->invalid) return cudaSuccess;
    if (id != nullptr) *id = capture->id;
    if (graph != nullptr) *graph = capture->graph;
    if (dependencies != nullptr) *dependencies = stream->tail.data();
    if (edges != nullptr) *edges = nullptr;
    if (count != nullptr) *count = stream->tail.size();
    return cudaSuccess;
  });
}

cudaError_t cudaStreamUpdateCaptureDependencies(cudaStream_t handle, cudaGraphNode_t* nodes,
                                                const cudaGraphEdgeData*, size_t count,
                                                unsigned flags) {
  return device_call("cudaStreamUpdateCaptureDependencies", [=](Lock&) {
    CUstream_st* stream = resolve(handle);
    if (stream == nullptr) return cudaErrorInvalidResourceHandle;
    if (stream->capture == nullptr) return cudaErrorIllegalState;
    if (count > 0 && nodes == nullptr) return cudaErrorInvalidValue;
    if (flags == cudaStreamSetCaptureDependencies) stream->tail.clear();
    add_unique(stream->tail, std::vector<CUgraphNode_st*>(nodes, nodes + count));
    return cudaSuccess;
  });
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  return device_call("cudaThreadExchangeStreamCaptureMode", [=](Lock&) {
    if (mode == nullptr) return cudaErrorInvalidValue;
    std::swap(*mode, mode_of_thread);
    return cudaSuccess;
  });
}

cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* count) {
  return device_call("cudaGraphGetNodes", [=](Lock&) {
    if (state().graphs.count(graph) == 0 || count == nullptr) return cudaErrorInvalidValue;
    if (nodes != nullptr) {
      for (size_t i = 0; i < *count; ++i) {
        nodes[i] = i < graph->nodes.size() ? graph->nodes[i].get() : nullptr;
      }
    }
    *count = graph->nodes.size();
    return cudaSuccess;
  });
}

cudaError_t cudaGraphNodeGetType(cudaGraphNode_t node, cudaGraphNodeType* type) {
  return device_call("cudaGraphNodeGetType", [=](Lock&) {
    if (node == nullptr || type == nullptr) return cudaErrorInvalidValue;
    const cudaGraphNodeType types[] = {cudaGraphNodeTypeKernel, cudaGraphNodeTypeMemcpy,
                                       cudaGraphNodeTypeMemset, cudaGraphNodeTypeHost,
                                       cudaGraphNodeTypeEmpty};
    *type = types[static_cast<int>(node->operation.kind)];
    return cudaSuccess;
  });
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  return device_call("cudaGraphDestroy", [=](Lock&) {
    if (state().graphs.count(graph) == 0) return cudaErrorInvalidValue;
    drop_graph(graph);
    return cudaSuccess;
  });
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph,
                                 unsigned long long flags) {
  return device_call("cudaGraphInstantiate", [=](Lock&) {
    if (executable == nullptr || state().graphs.count(graph) == 0) return cudaErrorInvalidValue;
    if (flags & cudaGraphInstantiateFlagDeviceLaunch) return cudaErrorNotSupported;
    auto* made = new CUgraphExec_st;
    made->plan = make_plan(*graph);
    state().executables.insert(made);
    *executable = made;
    return cudaSuccess;
  });
}

cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* executable, cudaGraph_t graph,
                                          unsigned long long flags) {
  return cudaGraphInstantiate(executable, graph, flags);
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  return device_call("cudaGraphExecDestroy", [=](Lock&) {
    if (state().executables.erase(executable) == 0) return cudaErrorInvalidValue;
    executable->plan = nullptr;
    return cudaSuccess;
  });
}

cudaError_t cudaGraphUpload(cudaGraphExec_t executable, cudaStream_t stream) {
  return device_call("cudaGraphUpload", [=](Lock&) {
    if (resolve(stream) == nullptr) return cudaErrorInvalidResourceHandle;
    return state().executables.count(executable) != 0 ? cudaSuccess : cudaErrorInvalidValue;
  });
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t handle) {
  return device_call("cudaGraphLaunch", [=](Lock&) {
    CUstream_st* stream = resolve(handle);
    if (stream == nullptr) return cudaErrorInvalidResourceHandle;
    if (state().executables.count(executable) == 0) return cudaErrorInvalidValue;
    if (stream->capture != nullptr) return cudaErrorNotSupported;  // no graphs within graphs
    if (const cudaError_t error = check_legacy(stream); error != cudaSuccess) return error;
    std::vector<Ticket> after;
    if (executable->last != nullptr) after.push_back(executable->last);
    executable->last =
        enqueue(stream, [plan = executable->plan] { run_plan(*plan); }, std::move(after));
    return cudaSuccess;
  });
}
