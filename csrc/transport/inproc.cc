// Ranks as threads of one process: the same rings as shm, in ordinary memory. For tests, sanitizers
// and programs that drive several ranks from one process.
#include <cstdlib>
#include <map>
#include <mutex>
#include <string>

#include "transport/shared_arena.h"
#include "transport/transport.h"

namespace dpcomm {
namespace {

struct FreeMemory {
  void operator()(std::byte* memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<std::byte, FreeMemory>;

/// The arena of a name, made by the first rank that comes; it lives as long as a rank uses it. A
/// name can be used again once all ranks of the group before have met.
struct Meeting {
  std::shared_ptr<std::byte> memory;
  int arrived = 0;
};

std::shared_ptr<std::byte> meet(const std::string& name, int world, size_t bytes) {
  static std::mutex mutex;
  static std::map<std::string, Meeting> meetings;
  std::lock_guard lock(mutex);
  Meeting& meeting = meetings[name];
  if (meeting.memory == nullptr) {
    const size_t rounded = (bytes + 4095) / 4096 * 4096;
    Memory memory(static_cast<std::byte*>(std::aligned_alloc(4096, rounded)));
    if (memory == nullptr) throw internal_error("cannot allocate ", rounded, " bytes for inproc");
    std::memset(memory.get(), 0, rounded);
    meeting.memory = std::shared_ptr<std::byte>(std::move(memory));
  }
  const auto memory = meeting.memory;
  if (++meeting.arrived == world) meetings.erase(name);
  return memory;
}

class InprocTransport final : public ArenaTransport {
 public:
  InprocTransport(const TransportConfig& config, ArenaLayout layout)
      : ArenaTransport(config.rank, layout),
        memory_(meet(config.name, config.world, layout.bytes())) {
    attach(memory_.get());
    const std::vector<int> missing = wait_for_all(config.timeout);
    if (missing.empty()) return;
    throw timeout_error("group '", config.name, "' of ", config.world, " ranks: rank ",
                        missing.front(), " did not come within ", config.timeout.count(), " ms");
  }

  PeerState peer_state(int rank) const override {
    return line(rank).state.load() == RankLine::kClosed ? PeerState::kClosed : PeerState::kAlive;
  }

 private:
  std::shared_ptr<std::byte> memory_;
};

}  // namespace

std::unique_ptr<Transport> make_inproc_transport(const TransportConfig& config) {
  return std::make_unique<InprocTransport>(config, ArenaLayout{config.world, geometry_for(config)});
}

}  // namespace dpcomm
