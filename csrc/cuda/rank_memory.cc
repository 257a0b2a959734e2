#include "cuda/rank_memory.h"

#include <atomic>
#include <cstring>

#include "schedule/registry.h"

namespace dpcomm {
namespace {

static_assert(sizeof(WaitRecord) % 8 == 0);

size_t padded(size_t bytes) { return (bytes + 255) / 256 * 256; }

size_t table_entries(const StagingGeometry& geometry) {
  return size_t(geometry.ctas) * channel_lanes() * geometry.world;
}

/// Offsets of what a rank's tables hold.
struct Tables {
  size_t ends = 0, counts, packets, epochs, bytes;

  explicit Tables(const StagingGeometry& geometry) {
    counts = padded(ends + table_entries(geometry) * sizeof(ChannelEnds));
    packets = padded(counts + table_entries(geometry) * sizeof(ChannelCounts));
    epochs = padded(packets + geometry.world * sizeof(char*));
    bytes = padded(epochs + geometry.ctas * sizeof(uint32_t));
  }
};

/// For what is done at the start, on the current device.
class OwnStream {
 public:
  explicit OwnStream(const char* what) {
    check_cuda(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), what, ": a stream");
  }
  ~OwnStream() { cudaStreamDestroy(stream_); }
  OwnStream(const OwnStream&) = delete;
  OwnStream& operator=(const OwnStream&) = delete;
  operator cudaStream_t() const { return stream_; }

 private:
  cudaStream_t stream_ = nullptr;
};

uint32_t load_word(const uint32_t& word) {
  return std::atomic_ref<uint32_t>(const_cast<uint32_t&>(word)).load();
}

}  // namespace

void copy_to_device(void* target, const void* source, size_t bytes, const char* what) {
  const OwnStream stream(what);
  check_cuda(cudaMemcpyAsync(target, source, bytes, cudaMemcpyHostToDevice, stream), what);
  check_cuda(cudaStreamSynchronize(stream), what);
}

DeviceMemory::DeviceMemory(size_t bytes, const char* what) {
  const OwnStream stream(what);
  check_cuda(cudaMalloc(&memory_, bytes), what, " of ", bytes, " bytes on the CUDA device");
  cudaError_t error = cudaMemsetAsync(memory_, 0, bytes, stream);
  if (error == cudaSuccess) error = cudaStreamSynchronize(stream);
  if (error == cudaSuccess) return;
  cudaFree(memory_);
  check_cuda(error, what, ": writing zeros");
}

HostWords::HostWords(int ctas) : records_(ctas * kMaxScheduleLanes) {
  const size_t bytes = kFlagLineBytes + records_ * sizeof(WaitRecord);
  void* memory = nullptr;
  check_cuda(cudaHostAlloc(&memory, bytes, cudaHostAllocMapped | cudaHostAllocPortable),
             "host memory for the CUDA device");
  host_ = static_cast<char*>(memory);
  std::memset(host_, 0, bytes);
  const cudaError_t error = cudaHostGetDevicePointer(&memory, host_, 0);
  if (error != cudaSuccess) {
    cudaFreeHost(host_);
    check_cuda(error, "the address of host memory on the CUDA device");
  }
  device_ = static_cast<char*>(memory);
}

void HostWords::abort() {
  aborted_.store(true);
  std::atomic_ref<uint32_t>(*reinterpret_cast<uint32_t*>(host_)).store(1);
}

std::vector<WaitRecord> HostWords::waits() const {
  std::vector<WaitRecord> found;
  for (int i = 0; i < records_; ++i) {
    const char* place = host_ + kFlagLineBytes + i * sizeof(WaitRecord);
    uint32_t words[sizeof(WaitRecord) / 4];
    for (size_t w = 0; w < sizeof(words) / 4; ++w) {
      words[w] = load_word(reinterpret_cast<const uint32_t*>(place)[w]);
    }
    WaitRecord record;
    std::memcpy(&record, words, sizeof(record));
    if (record.state != static_cast<uint32_t>(WaitKind::kNone)) found.push_back(record);
  }
  return found;
}

RankMemory::RankMemory(int rank, const StagingLayout& layout)
    : rank_(rank),
      words_(layout.geometry().ctas),
      staging_(layout.bytes(), "staging"),
      tables_(Tables(layout.geometry()).bytes, "tables of channels") {}

RankState RankMemory::connect(const StagingLayout& layout, const std::vector<char*>& bases) {
  const StagingGeometry& geometry = layout.geometry();
  const Tables at(geometry);
  std::vector<char> bytes(at.bytes, 0);
  const std::vector<ChannelEnds> ends = layout.ends(rank_, bases);
  std::memcpy(bytes.data() + at.ends, ends.data(), ends.size() * sizeof(ChannelEnds));
  for (int rank = 0; rank < geometry.world; ++rank) {
    char* const packets = bases[rank] + layout.packets_at();
    std::memcpy(bytes.data() + at.packets + rank * sizeof(char*), &packets, sizeof(char*));
  }
  copy_to_device(tables_.get(), bytes.data(), bytes.size(), "writing tables of channels");
  RankState state{};
  state.rank = rank_;
  state.world = geometry.world;
  state.slots = geometry.slots;
  state.channel_lanes = channel_lanes();
  state.slot_bytes = geometry.slot_bytes;
  state.ends = reinterpret_cast<const ChannelEnds*>(tables_.get() + at.ends);
  state.counts = reinterpret_cast<ChannelCounts*>(tables_.get() + at.counts);
  state.packets = reinterpret_cast<char* const*>(tables_.get() + at.packets);
  state.packet_capacity = geometry.packet_capacity;
  state.packet_epoch = reinterpret_cast<uint32_t*>(tables_.get() + at.epochs);
  state.max_ctas = geometry.ctas;
  state.abort = words_.abort_on_device();
  state.waits = words_.waits_on_device();
  state.look_every = kLookEvery;
  state.record_after = kRecordAfter;
  return state;
}

}  // namespace dpcomm
