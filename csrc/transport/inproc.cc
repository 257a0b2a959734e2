// Ranks as threads of one process: the same rings as shm, in ordinary memory. For tests, sanitizers
// and programs that drive several ranks from one process.
#include <cstdlib>
#include <map>
#include <mutex>
#include <string>

#include "transport/process_memory.h"
#include "transport/shared_arena.h"
#include "transport/transport.h"

namespace dpcomm {
namespace {

struct FreeMemory {
  void operator()(std::byte* memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<std::byte, FreeMemory>;

/// The arenas of groups whose ranks have not all come, by name. An arena lives as long as a rank
/// uses it; a name can be used again once its group has met, or has given up.
class Meetings {
 public:
  std::shared_ptr<std::byte> join(const std::string& name, int world, size_t bytes) {
    std::lock_guard lock(mutex_);
    Meeting& meeting = meetings_[name];
    if (meeting.memory == nullptr) meeting.memory = allocate(bytes);
    const auto memory = meeting.memory;
    if (++meeting.arrived == world) meetings_.erase(name);
    return memory;
  }
  void give_up(const std::string& name, const std::shared_ptr<std::byte>& memory) {
    std::lock_guard lock(mutex_);
    const auto found = meetings_.find(name);
    if (found != meetings_.end() && found->second.memory == memory) meetings_.erase(found);
  }

 private:
  struct Meeting {
    std::shared_ptr<std::byte> memory;
    int arrived = 0;
  };

  static Memory allocate(size_t bytes) {
    const size_t rounded = (bytes + 4095) / 4096 * 4096;
    Memory memory(static_cast<std::byte*>(std::aligned_alloc(4096, rounded)));
    if (memory == nullptr) throw internal_error("cannot allocate ", rounded, " bytes for inproc");
    std::memset(memory.get(), 0, rounded);
    return memory;
  }

  std::mutex mutex_;
  std::map<std::string, Meeting> meetings_;
};

Meetings& meetings() {
  static Meetings all;
  return all;
}

class InprocTransport final : public ArenaTransport {
 public:
  InprocTransport(const TransportConfig& config, ArenaLayout layout)
      : ArenaTransport(config.rank, layout),
        memory_(meetings().join(config.name, config.world, layout.bytes())) {
    attach(memory_.get());
    line(rank()).reaches.store(reading_wanted() && can_read_own());
    try {
      wait_for_all(config, Clock::now() + config.timeout);
    } catch (...) {
      meetings().give_up(config.name, memory_);
      throw;
    }
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
