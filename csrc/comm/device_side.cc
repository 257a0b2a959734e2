#include "comm/device_side.h"

#include <pthread.h>

#include <cstring>

#include "base/env.h"
#include "base/log.h"

namespace dpcomm {
namespace {

constexpr std::chrono::milliseconds kGrace{1000};  // for operations to end by themselves
constexpr std::chrono::milliseconds kLeave{2000};  // for kernels to see that they are aborted
constexpr size_t kTextBytes = 400;

/// What a rank tells in each round of the start.
struct Report {
  int32_t max_ctas = 0;
  uint32_t failed = 0;
  uint64_t staging_bytes = 0;
  DeviceHandle handle;
  char text[kTextBytes] = {};
};

/// An engine whose staging peers may still write to, or that may still write to theirs.
struct Parked {
  std::shared_ptr<Transport> transport;
  std::shared_ptr<DeviceEngine> engine;
  OpRecord shown;
  uint64_t last_ticket = 0;
};

/// True once the rank and all others have left: nobody touches the staging any more.
bool is_free(Parked& parked) {
  Transport& transport = *parked.transport;
  if (parked.shown.stage != static_cast<uint8_t>(Stage::kLeft)) {
    if (!parked.engine->complete(parked.last_ticket)) return false;
    parked.engine->disconnect();
    parked.shown.stage = static_cast<uint8_t>(Stage::kLeft);
    transport.announce(parked.shown, Place::kDevice);
  }
  for (int rank = 0; rank < transport.world(); ++rank) {
    const auto stage = static_cast<Stage>(transport.announced(rank, Place::kDevice).stage);
    if (stage != Stage::kLeft && transport.peer_state(rank) != PeerState::kDead) return false;
  }
  return true;
}

/// Engines that wait for their peers to leave. Never destroyed: a process that ends need not wait.
class Park {
 public:
  static Park& instance() {
    static Park* const park = new Park;
    return *park;
  }
  void add(Parked parked) {
    const std::lock_guard lock(mutex_);
    all_.push_back(std::move(parked));
  }
  /// Frees the staging of those that nobody uses any more.
  void sweep() {
    const std::lock_guard lock(mutex_);
    std::erase_if(all_, [](Parked& parked) {
      try {
        return is_free(parked);
      } catch (const Error& error) {  // the device is lost, and its memory with it
        log_line(LogLevel::kWarn, error.what());
        return true;
      }
    });
  }

 private:
  std::mutex mutex_;
  std::vector<Parked> all_;
};

OpRecord describe_operation(const Operation& operation, const Choice& choice) {
  OpRecord record;
  record.count = operation.count;
  record.factor = operation.op == ReduceOp::kPremulSum ? operation.factor : 0;
  record.root = operation.root;
  record.collective = static_cast<uint8_t>(operation.collective);
  record.dtype = static_cast<uint8_t>(operation.dtype);
  record.op = static_cast<uint8_t>(operation.op);
  record.wire = static_cast<uint8_t>(choice.wire);
  record.algorithm = static_cast<uint8_t>(choice.algorithm);
  return record;
}

int wanted_ctas() {
  const double number = environment_number(Variable::MAX_CTAS, 16);
  if (number < 1 || number > 255) {
    throw usage_error("DPCOMM_MAX_CTAS=", number, " is not a number from 1 to 255");
  }
  return static_cast<int>(number);
}

}  // namespace

DeviceSide::DeviceSide(std::shared_ptr<Transport> transport, std::shared_ptr<Logbook> log,
                       int device, void* stream, const std::string& name,
                       const ExchangeBytes& exchange)
    : transport_(std::move(transport)),
      log_(std::move(log)),
      diagnosis_(*transport_, Place::kDevice),
      device_(device) {
  Park::instance().sweep();
  make(stream, name, exchange);
  thread_ = std::thread([this] {
    pthread_setname_np(pthread_self(), "dpcomm-device");
    watch();
  });
}

DeviceSide::~DeviceSide() { close(); }

/// All ranks agree, then make their engines, then connect them. What goes wrong on one rank is told
/// to all. Handles go over the communicator's own channels, which were set up through the store.
void DeviceSide::make(void* stream, const std::string& name, const ExchangeBytes& exchange) {
  const int rank = transport_->rank();
  const int world = transport_->world();
  Report own;
  std::vector<Report> all(world);
  const auto round = [&](const auto& body) {
    try {
      body();
    } catch (const std::exception& error) {
      own.failed = 1;
      std::strncpy(own.text, error.what(), kTextBytes - 1);
    }
    std::string bytes(reinterpret_cast<const char*>(&own), sizeof(own));
    bytes = exchange(bytes);
    std::memcpy(all.data(), bytes.data(), sizeof(Report) * world);
    for (int i = 0; i < 2 * world; ++i) {  // the own failure first
      const int from = i == 0 ? rank : i % world;
      if (!all[from].failed) continue;
      all[from].text[kTextBytes - 1] = '\0';
      const std::string text = all[from].text;
      throw usage_error(from == rank ? text : transport_->describe(from) + ": " + text);
    }
  };
  DeviceSetup setup{rank, world, device_, 0, 0, stream};
  round([&] {
    own.max_ctas = resident_ctas(device_, 1, wanted_ctas());
    own.staging_bytes =
        static_cast<uint64_t>(environment_number(Variable::STAGING_BYTES, 64 << 20));
  });
  setup.max_ctas = own.max_ctas;
  setup.staging_bytes = own.staging_bytes;
  for (const Report& other : all) {
    setup.max_ctas = std::min(setup.max_ctas, other.max_ctas);
    setup.staging_bytes = std::min<size_t>(setup.staging_bytes, other.staging_bytes);
  }
  round([&] {
    engine_ = make_device_engine(setup);
    own.handle = engine_->handle();
  });
  std::vector<DeviceHandle> handles;
  for (const Report& other : all) handles.push_back(other.handle);
  try {
    round([&] { engine_->connect(handles); });
  } catch (const Error&) {
    engine_->disconnect();
    own.failed = 0;
    if (!transport_->failed()) round([] {});  // before memory is freed that others have opened
    throw;
  }
  geometry_ = engine_->geometry();
  if (log_enabled(LogLevel::kInfo)) {
    const StagingGeometry& g = geometry_;
    log_line(LogLevel::kInfo, str("group '", name, "': rank ", rank, " on CUDA device ", device_,
                                  ", staging of ", engine_->staging_bytes(), " bytes, ", g.ctas,
                                  " CTAs, ", g.slots, " slots of ", g.slot_bytes, " bytes"));
  }
}

std::shared_ptr<DeviceEngine> DeviceSide::engine() {
  const std::lock_guard lock(mutex_);
  return engine_;
}

std::optional<DeviceSide::Flying> DeviceSide::first() {
  const std::lock_guard lock(mutex_);
  return flying_.empty() ? std::nullopt : std::optional(flying_.front());
}

/// With the mutex: one thread at a time announces.
void DeviceSide::announce(const OpRecord& record) {
  shown_ = record;
  shown_.alive_ns = now_ns();
  transport_->announce(shown_, Place::kDevice);
}

uint64_t DeviceSide::enqueue(const Operation& operation, const Choice& choice, void* caller,
                             std::chrono::milliseconds limit) {
  const std::lock_guard order(order_);
  const auto engine = this->engine();
  if (engine == nullptr) throw usage_error("the communicator is closed");
  if (const auto failure = transport_->failure()) throw Error(failure->kind, failure->message);
  OpRecord record = describe_operation(operation, choice);
  record.sequence = last_.sequence + 1;
  DeviceTask task;
  task.record = record;
  task.input = operation.input;
  task.output = operation.output;
  OpRecord agreed = record;
  agreed.sequence = 0;  // a graph that is launched again has the numbers of its capture
  task.tag = fingerprint(agreed);
  if (log_enabled(LogLevel::kTrace)) log_line(LogLevel::kTrace, describe(record) + " on a device");
  uint64_t ticket = 0;
  bool in_graph = false;
  try {
    ticket = engine->launch(task, caller);
    in_graph = engine->progress(ticket) == Progress::kInGraph;
  } catch (const Error& error) {
    // What the kernels do not support is refused on all ranks. Anything else goes wrong on this one
    // alone, and the others would wait for it.
    if (error.kind() == ErrorKind::kUsage) throw;
    transport_->fail(Failure{error.kind(), error.what()});
    engine->abort();
    throw;
  }
  last_ = record;
  const uint64_t flight = log_->given_to_device(operation, choice, record.sequence, limit);
  const std::lock_guard lock(mutex_);
  record.finished = shown_.finished;
  if (!in_graph) {
    flying_.push_back(Flying{ticket, record, limit, flight, false, {}});
  } else {
    graph_limit_ = limit;
    if (flying_.empty()) record.finished = record.sequence;
  }
  record.stage = static_cast<uint8_t>(Stage::kBehind);
  announce(record);
  changed_.notify_all();
  return ticket;
}

void DeviceSide::join(uint64_t ticket, void* caller) {
  if (const auto engine = this->engine()) engine->join(ticket, caller);
}

bool DeviceSide::complete(uint64_t ticket) {
  const auto engine = this->engine();
  if (engine == nullptr) return true;
  try {
    if (!engine->complete(ticket)) return false;
    if (!engine->aborted()) look_for_disagreement(*engine);
    advance();  // so that the others know, whatever becomes of this rank
  } catch (const Error& error) {
    transport_->fail(Failure{error.kind(), error.what()});
  }
  return true;
}

void DeviceSide::wait_for_end(std::chrono::milliseconds limit) {
  const auto deadline = Clock::now() + limit;
  for (advance(); first() && Clock::now() < deadline; advance()) {
    std::this_thread::sleep_for(std::chrono::microseconds(200));
  }
}

/// What is not complete will be aborted.
void DeviceSide::note_unfinished() {
  const std::lock_guard lock(mutex_);
  if (flying_.empty()) return;
  unfinished_ = Failure{ErrorKind::kPeer, str(describe(flying_.front().record),
                                              ": the communicator was closed before it was "
                                              "complete")};
  const Failure failure = transport_->failure().value_or(*unfinished_);
  for (const Flying& flying : flying_) log_->device_fails(flying.flight, failure);
}

std::optional<Failure> DeviceSide::failure() {
  const std::lock_guard lock(mutex_);
  return unfinished_;
}

void DeviceSide::stop_watching() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
    changed_.notify_all();
  }
  if (thread_.joinable()) thread_.join();
}

void DeviceSide::close() {
  {
    const std::lock_guard order(order_);  // nothing is launched any more
    const std::lock_guard lock(mutex_);
    if (closing_) return;
    closing_ = true;
  }
  const auto engine = this->engine();
  Parked parked{transport_, engine, {}, 0};
  try {
    if (!transport_->failed()) wait_for_end(kGrace);
    stop_watching();
    note_unfinished();
    engine->abort();  // also what graphs may run
    wait_for_end(kLeave);
  } catch (const Error& error) {
    stop_watching();
    note_unfinished();
    engine->abort();
    log_line(LogLevel::kWarn, error.what());
  }
  {
    const std::lock_guard lock(mutex_);
    engine_ = nullptr;
    parked.shown = shown_;
    if (!flying_.empty()) parked.last_ticket = flying_.back().ticket;
  }
  Park::instance().add(std::move(parked));
  Park::instance().sweep();
}

}  // namespace dpcomm
