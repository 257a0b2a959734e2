#include "emulator.h"

#include "scheduler.h"

namespace dpcomm::emulated {

struct World::Impl : Scheduler {
  using Scheduler::Scheduler;
};

World::World(const WorldOptions& options) : impl_(std::make_unique<Impl>(options)) {}
World::~World() = default;
void World::launch(Launch launch) { impl_->launch(std::move(launch)); }
bool World::advance() { return impl_->advance(); }
void World::run() {
  while (impl_->advance()) {
  }
  impl_->acquire_all();
}
void World::acquire(int stream) { impl_->acquire(stream); }
uint64_t World::turns() const { return impl_->turns(); }
std::string World::report() const { return impl_->report(); }
const RankCounts& World::counts(int rank) const { return impl_->counts(rank); }

}  // namespace dpcomm::emulated
