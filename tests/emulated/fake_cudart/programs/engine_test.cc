// The engine and the virtual group of csrc/cuda, called directly, all ranks in one process: each
// rank is a thread with a device of its own, and memory of peers is reached without handles. Under
// ThreadSanitizer too. The first argument names the part to run, the second the number of ranks.
#include <cuda_runtime_api.h>

#include <atomic>
#include <barrier>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <thread>

#include "cuda/plugin.h"
#include "schedule/registry.h"

extern "C" const dpcomm::CudaPlugin* dpcomm_cuda_plugin();

namespace {

using namespace dpcomm;
using Clock = std::chrono::steady_clock;

#define CHECK(condition)                                                    \
  do {                                                                      \
    if (!(condition)) {                                                     \
      std::printf("%s:%d: not true: %s\n", __FILE__, __LINE__, #condition); \
      std::fflush(stdout);                                                  \
      std::_Exit(1);                                                        \
    }                                                                       \
  } while (0)
#define OK(call) CHECK((call) == cudaSuccess)

const CudaPlugin& plugin() { return *dpcomm_cuda_plugin(); }

/// Floats on a device, and a pinned copy to fill and read them in stream order.
struct Tensor {
  explicit Tensor(size_t count) : count(count) {
    void* memory = nullptr;
    OK(cudaMalloc(&memory, count * sizeof(float)));
    device = static_cast<float*>(memory);
    OK(cudaMallocHost(&memory, count * sizeof(float)));
    host = static_cast<float*>(memory);
  }
  ~Tensor() {
    OK(cudaFree(device));
    OK(cudaFreeHost(host));
  }
  void up(cudaStream_t stream) {
    OK(cudaMemcpyAsync(device, host, count * sizeof(float), cudaMemcpyHostToDevice, stream));
  }
  void down(cudaStream_t stream) {
    OK(cudaMemcpyAsync(host, device, count * sizeof(float), cudaMemcpyDeviceToHost, stream));
  }
  size_t count;
  float* device = nullptr;
  float* host = nullptr;
};

/// Small whole numbers: sums are exact in any order.
float value(int rank, size_t i, uint64_t round) { return float((i * 7 + rank * 3 + round) % 17); }
float sum(int world, size_t i, uint64_t round) {
  float total = 0;
  for (int rank = 0; rank < world; ++rank) total += value(rank, i, round);
  return total;
}

OpRecord all_reduce(const char* algorithm, uint64_t sequence, size_t count) {
  OpRecord record;
  record.sequence = sequence;
  record.count = count;
  record.collective = static_cast<uint8_t>(Collective::kAllReduce);
  record.dtype = static_cast<uint8_t>(Dtype::kFloat32);
  record.op = static_cast<uint8_t>(ReduceOp::kSum);
  record.algorithm = static_cast<uint8_t>(find_algorithm(Collective::kAllReduce, algorithm));
  return record;
}

constexpr const char* kAlgorithmNames[] = {"ring", "two_shot", "double_tree"};
constexpr size_t kCounts[] = {1, 1000, 40000, 333, 20001};

/// Runs `body(rank, engine)` in a thread for each rank, and looks at all engines meanwhile, as the
/// watchdog of a communicator does.
void with_engines(int world, const std::function<void(int, DeviceEngine&)>& body) {
  std::vector<std::unique_ptr<DeviceEngine>> engines;
  std::vector<DeviceHandle> handles;
  for (int rank = 0; rank < world; ++rank) {
    DeviceSetup setup{rank, world, rank, 2, size_t{8} << 20, nullptr};
    engines.push_back(plugin().make_device_engine(setup));
    handles.push_back(engines.back()->handle());
  }
  for (auto& engine : engines) engine->connect(handles);
  std::atomic<bool> over{false};
  std::thread watchdog([&] {
    while (!over) {
      for (auto& engine : engines) {
        engine->waits();
        engine->aborted();
        engine->progress(1);
      }
      // Often: the fake runtime's own lock orders much that nothing orders on a device.
      std::this_thread::sleep_for(std::chrono::microseconds(20));
    }
  });
  std::vector<std::thread> threads;
  for (int rank = 0; rank < world; ++rank) {
    threads.emplace_back([&, rank] {
      OK(cudaSetDevice(rank));
      body(rank, *engines[rank]);
    });
  }
  for (std::thread& thread : threads) thread.join();
  over = true;
  watchdog.join();
  for (auto& engine : engines) engine->synchronize();
  for (auto& engine : engines) engine->disconnect();
}

cudaStream_t new_stream() {
  cudaStream_t stream = nullptr;
  OK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  return stream;
}

void results(int world) {
  with_engines(world, [=](int rank, DeviceEngine& engine) {
    cudaStream_t stream = new_stream();
    uint64_t sequence = 0;
    for (const char* algorithm : kAlgorithmNames) {
      for (const size_t count : kCounts) {
        Tensor in(count), out(count);
        ++sequence;
        for (size_t i = 0; i < count; ++i) in.host[i] = value(rank, i, sequence);
        in.up(stream);
        const DeviceTask task{all_reduce(algorithm, sequence, count), 1, in.device, out.device};
        const uint64_t ticket = engine.launch(task, stream);
        CHECK(ticket == sequence);
        engine.join(ticket, stream);
        out.down(stream);
        // The input may be overwritten as soon as the stream has joined.
        OK(cudaMemsetAsync(in.device, 0xee, count * sizeof(float), stream));
        OK(cudaStreamSynchronize(stream));
        CHECK(engine.complete(ticket));
        for (size_t i = 0; i < count; ++i) CHECK(out.host[i] == sum(world, i, sequence));
      }
    }
    OK(cudaStreamDestroy(stream));
  });
}

/// Operations one behind the other, from two streams of the caller, without a wait in between.
void many(int world) {
  constexpr int kRounds = 40;
  constexpr size_t kCount = 700;
  with_engines(world, [=](int rank, DeviceEngine& engine) {
    cudaStream_t streams[2] = {new_stream(), new_stream()};
    std::vector<std::unique_ptr<Tensor>> tensors;
    for (int round = 0; round < kRounds; ++round) {
      cudaStream_t stream = streams[round % 2];
      Tensor& tensor = *tensors.emplace_back(std::make_unique<Tensor>(kCount));
      for (size_t i = 0; i < kCount; ++i) tensor.host[i] = value(rank, i, round);
      tensor.up(stream);
      const OpRecord record = all_reduce(kAlgorithmNames[round % 3], round + 1, kCount);
      const uint64_t ticket =
          engine.launch(DeviceTask{record, 1, tensor.device, tensor.device}, stream);
      engine.join(ticket, stream);
      tensor.down(stream);
    }
    for (cudaStream_t stream : streams) OK(cudaStreamSynchronize(stream));
    for (int round = 0; round < kRounds; ++round) {
      const float* host = tensors[round]->host;
      for (size_t i = 0; i < kCount; ++i) CHECK(host[i] == sum(world, i, round));
    }
  });
}

/// One rank does not come; the others are let go, and what was queued behind does not run.
void abort(int world) {
  std::barrier<> all(world);
  with_engines(world, [&, world](int rank, DeviceEngine& engine) {
    constexpr size_t kCount = 5000;
    Tensor tensor(kCount);
    std::fill_n(tensor.host, kCount, 1.0f);
    cudaStream_t stream = new_stream();
    tensor.up(stream);
    if (rank != world - 1) {
      for (uint64_t sequence = 1; sequence <= 2; ++sequence) {
        const DeviceTask task{all_reduce("ring", sequence, kCount), 1, tensor.device,
                              tensor.device};
        engine.join(engine.launch(task, stream), stream);
      }
      std::this_thread::sleep_for(std::chrono::milliseconds(100));
      CHECK(!engine.complete(1));
      std::thread([&] { engine.abort(); }).join();
      CHECK(engine.aborted());
      const auto start = Clock::now();
      OK(cudaStreamSynchronize(stream));
      CHECK(Clock::now() - start < std::chrono::seconds(20));
      CHECK(engine.complete(1) && engine.complete(2));
      CHECK(engine.progress(2) == Progress::kComplete);
    }
    OK(cudaStreamSynchronize(stream));
    all.arrive_and_wait();
    OK(cudaStreamDestroy(stream));
  });
}

/// What a wait record says while rank 0 waits for the last rank.
void waits(int world) {
  std::atomic<bool> seen{false};
  with_engines(world, [&, world](int rank, DeviceEngine& engine) {
    constexpr size_t kCount = 5000;
    Tensor tensor(kCount);
    std::fill_n(tensor.host, kCount, 1.0f);
    cudaStream_t stream = new_stream();
    tensor.up(stream);
    const auto start = Clock::now();
    while (rank == world - 1 && !seen) {
      CHECK(Clock::now() - start < std::chrono::seconds(60));
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
    const DeviceTask task{all_reduce("two_shot", 1, kCount), 77, tensor.device, tensor.device};
    engine.join(engine.launch(task, stream), stream);
    while (rank == 0 && !seen) {
      CHECK(Clock::now() - start < std::chrono::seconds(60));
      for (const WaitRecord& record : engine.waits()) {
        CHECK(record.state == static_cast<uint32_t>(WaitKind::kArrival));
        CHECK(record.rank == 0 && record.sequence == 1 && record.seen < record.wanted);
        if (static_cast<int>(record.peer) == world - 1) seen = true;
      }
    }
    OK(cudaStreamSynchronize(stream));
    CHECK(engine.waits().empty());
    tensor.down(stream);
    OK(cudaStreamSynchronize(stream));
    for (size_t i = 0; i < kCount; ++i) CHECK(tensor.host[i] == float(world));
    OK(cudaStreamDestroy(stream));
  });
}

void group(int world) {
  DeviceSetup setup{0, world, 1, 2, size_t{8} << 20, nullptr};
  OK(cudaSetDevice(1));
  setup.max_ctas = plugin().resident_ctas(1, world, setup.max_ctas);
  CHECK(setup.max_ctas >= 1);
  const auto group = plugin().make_virtual_group(setup);
  CHECK(group->geometry().ctas == setup.max_ctas);
  cudaStream_t stream = new_stream();
  uint64_t sequence = 0;
  for (const char* algorithm : kAlgorithmNames) {
    for (const size_t count : kCounts) {
      ++sequence;
      std::vector<std::unique_ptr<Tensor>> tensors;
      std::vector<const void*> input;
      std::vector<void*> output;
      for (int rank = 0; rank < world; ++rank) {
        Tensor& tensor = *tensors.emplace_back(std::make_unique<Tensor>(count));
        for (size_t i = 0; i < count; ++i) tensor.host[i] = value(rank, i, sequence);
        tensor.up(stream);
        input.push_back(tensor.device);
        output.push_back(tensor.device);
      }
      group->launch(all_reduce(algorithm, sequence, count), 5, input, output, stream);
      for (auto& tensor : tensors) tensor->down(stream);
      OK(cudaStreamSynchronize(stream));
      for (auto& tensor : tensors) {
        for (size_t i = 0; i < count; ++i) CHECK(tensor->host[i] == sum(world, i, sequence));
      }
    }
  }
  OK(cudaStreamDestroy(stream));
}

/// More ranks than the device holds at a time.
void crowd(int world) {
  try {
    plugin().resident_ctas(0, world, 4);
  } catch (const Error& error) {
    CHECK(error.kind() == ErrorKind::kUsage);
    std::printf("%s\n", error.what());
    return;
  }
  CHECK(!"too many ranks were accepted");
}

const struct {
  const char* name;
  void (*run)(int world);
} kParts[] = {
    {"results", results}, {"many", many},   {"abort", abort},
    {"waits", waits},     {"group", group}, {"crowd", crowd},
};

}  // namespace

int main(int count, char** arguments) {
  for (const auto& part : kParts) {
    if (count == 3 && std::strcmp(arguments[1], part.name) == 0) {
      part.run(std::atoi(arguments[2]));
      std::printf("ok\n");
      return 0;
    }
  }
  std::printf("no such part\n");
  return 2;
}
