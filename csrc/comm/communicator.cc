#include "comm/communicator.h"

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <mutex>
#include <thread>

#include "base/env.h"
#include "base/fork.h"
#include "base/log.h"
#include "base/names.h"
#include "comm/choice_cache.h"
#include "comm/device_side.h"
#include "comm/logbook.h"
#include "comm/message_side.h"
#include "comm/operation.h"
#include "comm/tuner.h"
#include "cpu/diagnosis.h"
#include "cpu/executor.h"
#include "transport/transport.h"

namespace dpcomm {
CommunicatorOptions CommunicatorOptions::from_environment() {
  CommunicatorOptions options;
  options.wire = by_name<WireFormat>(environment(Variable::WIRE), kWireFormats, "DPCOMM_WIRE");
  const std::string links = environment(Variable::WIRE_LINKS);
  if (links != "network" && links != "all") {
    throw usage_error("DPCOMM_WIRE_LINKS=", links, " is neither network nor all");
  }
  options.wire_on_all_links = links == "all";
  options.algorithm = environment(Variable::ALGO);
  check_algorithm(options.algorithm);
  options.transport = environment(Variable::TRANSPORT);
  const std::string shared = environment(Variable::SHARED_BUCKETS);
  if (shared != "0" && shared != "1") {
    throw usage_error("DPCOMM_SHARED_BUCKETS=", shared, " is neither 0 nor 1");
  }
  options.shared_buckets = shared == "1";
  options.path = environment(Variable::PATH);
  if (options.path != "auto" && options.path != "channels") {
    throw usage_error("DPCOMM_PATH=", options.path, " is neither auto nor channels");
  }
  const double seconds = environment_number(Variable::TIMEOUT, 600);
  options.timeout = std::chrono::milliseconds(static_cast<int64_t>(seconds * 1000));
  return options;
}

/// Shared with the progress thread, which may outlive the communicator if that is closed from a
/// callback of its own.
struct Communicator::Impl : std::enable_shared_from_this<Communicator::Impl> {
  Impl(std::unique_ptr<Transport> made, const CommunicatorOptions& chosen)
      : transport(std::move(made)),
        options(chosen),
        executor(*transport, WaitPolicy::choose(transport->world()), closing),
        paths(*transport, WaitPolicy::choose(transport->world()), closing),
        host(paths.facts()),
        timeout_ms(chosen.timeout.count()),
        generation(fork_generation()),
        log(std::make_shared<Logbook>(transport->rank(), transport->world(), options)),
        messages(
            std::make_shared<MessageSide>(transport, WaitPolicy::choose(transport->world()), log)) {
    check_algorithm(options.algorithm);
  }

  /// One operation on its way; lives in the queue, or on the stack of a caller that waits for it.
  struct Item {
    Operation operation;
    Choice choice;
    std::shared_ptr<Work> work;
    uint64_t flight;  ///< in the flight recorder
  };

  void check_owner() const {
    if (generation == fork_generation()) return;
    throw usage_error("this communicator was made before a fork; a forked process cannot use it");
  }

  /// What a call may take, given what it asks for.
  std::chrono::milliseconds limit(std::chrono::milliseconds asked) const {
    return asked.count() > 0 ? asked : std::chrono::milliseconds(timeout_ms.load());
  }

  /// `device`: of its staging, for an operation on it; null for one on the CPU.
  Choice check(const Operation& operation, const StagingGeometry* device = nullptr) const;
  OpRecord next_record(const Operation& operation, const Choice& choice) const;
  uint64_t sent_bytes() const { return executor.wire_bytes() + paths.wire_bytes(); }
  uint64_t waited_ns() const { return executor.wait_ns() + paths.wait_ns(); }
  void execute(const Operation& operation, const Choice& choice, bool patient, uint64_t flight,
               Clock::time_point now);
  Failure fail_all(const Failure& failure);
  void abandon(const std::deque<Item>& items);
  void run_alone(const Operation& operation) const;
  void progress();
  void start_thread();
  void hand_over();
  std::optional<Failure> perform(const Operation& operation, const Choice& choice, bool patient,
                                 uint64_t flight, Clock::time_point now);
  /// Notes that the operation has got its place in the order; with `mutex` held.
  uint64_t note(const Operation& operation, const Choice& choice, Clock::time_point now,
                Given how) {
    return log->given(operation, choice, limit(operation.timeout), to_ns(now), how);
  }

  const std::shared_ptr<Transport> transport;
  const CommunicatorOptions options;
  std::atomic<bool> closing{false};
  Executor executor;
  LocalPaths paths;
  const HostFacts host;
  std::atomic<int64_t> timeout_ms;
  const uint32_t generation;
  const std::shared_ptr<Logbook> log;
  const std::shared_ptr<MessageSide> messages;

  std::mutex mutex;                 // guards what follows
  std::condition_variable changed;  // the queue has grown, or nothing runs any more
  std::deque<Item> queue;
  bool busy = false;  // an operation runs, in whatever thread
  bool closed = false;
  ChoiceCache choices;
  std::thread thread;  // runs what submit() was given; started by the first one
  /// The communicator whose thread this is, while it runs the callbacks of a work.
  static thread_local Impl* completing;

  // Of the thread that runs an operation.
  OpRecord last;
  uint32_t history = 0;                  // digest of all operations so far
  uint64_t wire_bytes = 0, wait_ns = 0;  // of all operations so far

  std::mutex opening;                  // held while a device is opened
  std::shared_ptr<DeviceSide> device;  // guarded by `mutex`; null until a device is opened
  std::shared_ptr<DeviceSide> open_device_side();
};

Choice Communicator::Impl::check(const Operation& operation, const StagingGeometry* device) const {
  check_operation(operation, transport->rank(), transport->world());
  return choose(operation, options, host, device);
}

/// A world of one: what is left of an operation.
void Communicator::Impl::run_alone(const Operation& operation) const {
  const size_t elem = size_bytes(operation.dtype);
  const size_t total = operation.count * elem;
  const auto* input = static_cast<const std::byte*>(operation.input);
  auto* output = static_cast<std::byte*>(operation.output);
  if (total == 0 || output == nullptr) return;
  if (reduces(operation.collective) && operation.op == ReduceOp::kPremulSum) {
    const Isa isa = best_isa();
    const Codec& codec = tensor_codec(operation.dtype, isa);
    std::vector<double> tile(1024);
    for (size_t first = 0; first < operation.count; first += tile.size()) {
      const size_t n = std::min(tile.size(), operation.count - first);
      codec.load(tile.data(), input, operation.count, first, n);
      accumulator_ops(operation.dtype, isa).premultiply(tile.data(), operation.factor, n);
      codec.store(output, operation.count, first, tile.data(), n, false);
    }
  } else if (input != nullptr && input != output) {
    std::memcpy(output, input, total);
  }
}

/// Of the operation that comes after the last one.
OpRecord Communicator::Impl::next_record(const Operation& operation, const Choice& choice) const {
  OpRecord record = last;
  ++record.sequence;
  record.count = told_count(operation, transport->world());
  record.blocks = blocks_digest(operation);
  record.factor = operation.op == ReduceOp::kPremulSum ? operation.factor : 0;
  record.root = operation.root;
  record.collective = static_cast<uint8_t>(operation.collective);
  record.dtype = static_cast<uint8_t>(operation.dtype);
  record.op = static_cast<uint8_t>(operation.op);
  record.wire = static_cast<uint8_t>(choice.wire);
  record.algorithm = static_cast<uint8_t>(choice.algorithm);
  record.path = static_cast<uint8_t>(choice.path);
  return record;
}

/// `patient` where it runs beside the caller's own work; else it has begun when it was given.
void Communicator::Impl::execute(const Operation& operation, const Choice& choice, bool patient,
                                 uint64_t flight, Clock::time_point now) {
  if (const auto failure = transport->failure()) throw Error(failure->kind, failure->message);
  if (!operation.refusal.empty()) {
    throw usage_error(transport->describe(transport->rank()), " cannot run ",
                      name(operation.collective), " #", last.sequence + 1, ": ", operation.refusal);
  }
  OpRecord& record = last;
  record = next_record(operation, choice);
  record.alive_ns = to_ns(now);
  transport->announce(record);
  log->begins(patient ? flight : 0, record);
  if (transport->world() == 1) {
    run_alone(operation);
  } else {
    Task task;
    task.record = record;
    task.tag = fingerprint(record);
    task.history = history;
    history = (history ^ task.tag) * 0x9e3779b1u;
    task.input = static_cast<const std::byte*>(operation.input);
    task.output = static_cast<std::byte*>(operation.output);
    task.collective = operation.collective;
    task.count = operation.collective == Collective::kBarrier ? 0 : operation.count;
    task.counts = operation.counts;
    task.recv_counts = operation.recv_counts;
    task.dtype = operation.dtype;
    task.op = operation.op;
    task.factor = operation.factor;
    task.root = operation.root;
    task.wire = choice.wire;
    task.algorithm = choice.algorithm;
    task.patient = patient;
    const int64_t limit =
        operation.timeout.count() > 0 ? operation.timeout.count() : timeout_ms.load();
    task.deadline = now + std::chrono::milliseconds(limit);
    task.limit = std::chrono::milliseconds(limit);
    task.interrupted = &operation.interrupted;
    if (choice.path == Path::kChannels) {
      executor.run(task);
    } else {
      paths.run(task, choice.path);
    }
  }
  record.finished = record.sequence;
  transport->announce(record);
  const Logbook::Cost cost{record.count * size_bytes(operation.dtype), sent_bytes() - wire_bytes,
                           waited_ns() - wait_ns};
  const int64_t took = log->ends(flight, record, cost);
  if (!patient) log->waited(took);
  wire_bytes = sent_bytes();
  wait_ns = waited_ns();
}

/// Runs an operation; an error makes the communicator unusable on all ranks, with one text.
std::optional<Failure> Communicator::Impl::perform(const Operation& operation, const Choice& choice,
                                                   bool patient, uint64_t flight,
                                                   Clock::time_point now) {
  Failure failure;
  try {
    execute(operation, choice, patient, flight, now);
    return std::nullopt;
  } catch (const Error& error) {
    failure = Failure{error.kind(), error.what()};
  } catch (const std::exception& error) {
    failure = Failure{ErrorKind::kInternal, error.what()};
  }
  failure = fail_all(failure);
  log->fails(flight, failure);
  return failure;
}

/// The failure that all ranks have: this one, or an earlier one.
Failure Communicator::Impl::fail_all(const Failure& failure) {
  transport->fail(failure);
  return transport->failure().value_or(failure);
}

/// Ends what was in the queue of a communicator that is closed, once nothing runs any more.
void Communicator::Impl::abandon(const std::deque<Item>& items) {
  if (items.empty()) return;
  Failure failure;
  try {
    if (const auto first = transport->failure()) throw Error(first->kind, first->message);
    const Item& next = items.front();
    Diagnosis(*transport, Place::kHost).leave(next_record(next.operation, next.choice));
  } catch (const Error& error) {
    failure = fail_all(Failure{error.kind(), error.what()});
  }
  for (const Item& item : items) item.work->complete(failure);
}

void Communicator::Impl::progress() {
  std::unique_lock lock(mutex);
  for (;;) {
    changed.wait(lock, [this] { return !busy && (closed || !queue.empty()); });
    if (queue.empty()) return;
    Item item = std::move(queue.front());
    queue.pop_front();
    busy = true;
    lock.unlock();
    std::optional<Failure> error =
        perform(item.operation, item.choice, true, item.flight, Clock::now());
    lock.lock();
    busy = false;
    changed.notify_all();
    lock.unlock();
    completing = this;
    item.work->complete(std::move(error));
    item.work.reset();  // what the callbacks hold is released before the next operation
    const bool handed_over = completing == nullptr;
    completing = nullptr;
    if (handed_over) return;
    lock.lock();
  }
}

thread_local Communicator::Impl* Communicator::Impl::completing = nullptr;

/// For a callback that may wait for operations of its own: the thread that runs it leaves those to
/// a new thread, and ends after the callback. With the mutex held; at most once for each work.
void Communicator::Impl::hand_over() {
  if (completing != this || closed) return;
  completing = nullptr;
  thread.detach();
  start_thread();
}

void Communicator::Impl::start_thread() {
  if (thread.joinable()) return;
  thread = std::thread([self = shared_from_this()] {
    pthread_setname_np(pthread_self(), "dpcomm");
    self->progress();
  });
}

Communicator::Communicator(std::unique_ptr<Transport> transport, const CommunicatorOptions& options)
    : impl_(std::make_shared<Impl>(std::move(transport), options)) {}

std::shared_ptr<Communicator> Communicator::create(int rank, int world, Bootstrap& bootstrap,
                                                   const CommunicatorOptions& options) {
  if (world < 1 || rank < 0 || rank >= world) {
    throw usage_error("rank ", rank, " of ", world, " ranks makes no sense");
  }
  check_algorithm(options.algorithm);
  TransportConfig config;
  config.rank = rank;
  config.world = world;
  config.lanes = channel_lanes();
  config.slot_bytes = static_cast<size_t>(environment_number(Variable::SLOT_BYTES, 0));
  config.name = options.name;
  config.timeout = options.timeout;
  config.bootstrap = &bootstrap;
  auto transport = make_transport(options.transport, config);
  if (rank == 0 && log_enabled(LogLevel::kInfo)) {
    log_line(LogLevel::kInfo, group_line(options, *transport));
  }
  return std::make_shared<Communicator>(std::move(transport), options);
}

Communicator::~Communicator() {
  if (impl_->generation != fork_generation()) {
    // A forked child: the thread does not exist here and the memory is not mapped.
    new std::shared_ptr<Impl>(std::move(impl_));  // never destroyed
    return;
  }
  close();
}

int Communicator::rank() const { return impl_->transport->rank(); }
int Communicator::world() const { return impl_->transport->world(); }
LaneGeometry Communicator::geometry(int lane) const {
  if (lane < 0 || lane >= channel_lanes()) throw usage_error("there is no lane ", lane);
  return impl_->transport->geometry(lane);
}
const CommunicatorOptions& Communicator::options() const { return impl_->options; }

void Communicator::run(const Operation& given) {
  Impl& impl = *impl_;
  impl.check_owner();
  Operation room;
  const Operation& operation = sized(given, world(), room);
  check_operation(operation, rank(), world());
  MessageSide::about_to_block();
  std::unique_lock lock(impl.mutex);
  if (impl.closed) throw usage_error("the communicator is closed");
  if (impl.busy || !impl.queue.empty()) {
    lock.unlock();
    const auto work = submit(operation);
    if (work->wait({}, operation.interrupted)) return;
    abort(
        str(impl.transport->describe(rank()), " was interrupted in ", name(operation.collective)));
    work->wait();  // the buffers are the caller's
    return;
  }
  const Choice choice = impl.choices.find(operation, impl.options, impl.host);
  const auto now = Clock::now();
  const Given how = impl.transport->failed() ? Given::kFails : Given::kStarts;
  const uint64_t flight = impl.note(operation, choice, now, how);
  impl.busy = true;
  lock.unlock();
  const std::optional<Failure> error = impl.perform(operation, choice, false, flight, now);
  lock.lock();
  impl.busy = false;
  if (impl.closed || !impl.queue.empty()) impl.changed.notify_all();
  lock.unlock();
  if (error) throw Error(error->kind, error->message);
}

std::shared_ptr<Work> Communicator::submit(const Operation& given) {
  Impl& impl = *impl_;
  impl.check_owner();
  Operation room;
  const Operation& operation = sized(given, world(), room);
  auto work = std::make_shared<Work>();
  work->count_waits(impl.log->exposed_wait_ns());
  Impl::Item item{operation, impl.check(operation), work, 0};
  item.operation.interrupted = nullptr;  // not in another thread
  std::lock_guard lock(impl.mutex);
  if (impl.closed) throw usage_error("the communicator is closed");
  item.flight = impl.note(operation, item.choice, Clock::now(), Given::kWaits);
  impl.hand_over();
  impl.start_thread();
  impl.queue.push_back(std::move(item));
  impl.changed.notify_all();
  return work;
}

void Communicator::refuse(Collective collective, const std::string& reason) {
  Operation operation;
  operation.collective = collective;
  operation.refusal = reason;
  run(operation);
  throw internal_error("an operation that was refused has run");
}

std::shared_ptr<Work> Communicator::send(int peer, uint32_t tag, const void* data, size_t bytes,
                                         std::chrono::milliseconds timeout) {
  impl_->check_owner();
  return impl_->messages->post(true, peer, tag, const_cast<void*>(data), bytes,
                               impl_->limit(timeout));
}

std::shared_ptr<Work> Communicator::recv(int peer, uint32_t tag, void* data, size_t bytes,
                                         std::chrono::milliseconds timeout) {
  static_assert(kAnySource == Transfer::kAnyPeer);
  impl_->check_owner();
  return impl_->messages->post(false, peer, tag, data, bytes, impl_->limit(timeout));
}

std::shared_ptr<DeviceSide> Communicator::Impl::open_device_side() {
  check_owner();
  const std::lock_guard lock(mutex);
  return device;
}

void Communicator::open_device(int device, void* stream, const std::function<bool()>& interrupted) {
  Impl& impl = *impl_;
  const std::lock_guard opening(impl.opening);
  if (const auto open = impl.open_device_side()) {
    if (open->device() == device) return;
    throw usage_error("the communicator uses CUDA device ", open->device(),
                      "; operations on device ", device, " need one of their own");
  }
  const auto exchange = [&](const std::string& own) {
    std::string all(own.size() * world(), '\0');
    Operation gather;
    gather.collective = Collective::kAllGather;
    gather.dtype = Dtype::kUint8;
    gather.input = own.data();
    gather.output = all.data();
    gather.count = own.size();
    gather.interrupted = interrupted;
    run(gather);
    return all;
  };
  auto made = std::make_shared<DeviceSide>(impl.transport, impl.log, device, stream,
                                           impl.options.name, exchange);
  std::unique_lock lock(impl.mutex);
  if (!impl.closed) {
    impl.device = std::move(made);
    return;
  }
  lock.unlock();
  made->close();
  throw usage_error("the communicator is closed");
}

uint64_t Communicator::enqueue(const Operation& given, void* caller) {
  Impl& impl = *impl_;
  Operation room;
  const Operation& operation = sized(given, world(), room);
  dpcomm::check_on_device(operation);
  const auto device = impl.open_device_side();
  if (device == nullptr) throw usage_error("no device is open; open_device() comes first");
  if (operation.collective == Collective::kBarrier) {
    throw usage_error("a barrier is not an operation on a device");
  }
  const Choice choice = impl.check(operation, &device->geometry());
  if (reduces(operation.collective)) {
    const size_t elem = size_bytes(operation.dtype);
    for (const void* buffer : {operation.input, static_cast<const void*>(operation.output)}) {
      if (reinterpret_cast<uintptr_t>(buffer) % elem == 0) continue;
      throw usage_error(name(operation.collective), ": a buffer of ", name(operation.dtype),
                        " on a device begins at a multiple of ", elem, " bytes");
    }
  }
  const int64_t limit =
      operation.timeout.count() > 0 ? operation.timeout.count() : impl.timeout_ms.load();
  return device->enqueue(operation, choice, caller, std::chrono::milliseconds(limit));
}

void Communicator::join(uint64_t ticket, void* caller) {
  if (const auto device = impl_->open_device_side()) device->join(ticket, caller);
}

bool Communicator::complete(uint64_t ticket) const {
  if (impl_->generation != fork_generation()) return true;  // nobody is left to complete it
  const auto device = impl_->open_device_side();
  return device == nullptr || device->complete(ticket);
}

std::exception_ptr Communicator::failure() const {
  auto failure = impl_->transport->failure();
  if (!failure && impl_->generation == fork_generation()) {
    if (const auto device = impl_->open_device_side()) failure = device->failure();
  }
  if (!failure) return nullptr;
  return std::make_exception_ptr(Error(failure->kind, failure->message));
}

void Communicator::about_to_block() {
  MessageSide::about_to_block();
  Impl* impl = Impl::completing;
  if (impl == nullptr) return;
  std::lock_guard lock(impl->mutex);
  impl->hand_over();
}

void Communicator::check_on_device(const Operation& operation) const {
  Operation room;
  dpcomm::check_on_device(sized(operation, world(), room));
}

std::pair<std::string, WireFormat> Communicator::choice(const Operation& given) const {
  Operation room;
  const Operation& operation = sized(given, world(), room);
  const Choice choice = choose(operation, impl_->options, impl_->host);
  return {kAlgorithms[choice.algorithm].name, choice.wire};
}

CommunicatorStats Communicator::stats() const {
  const MessageSide& messages = *impl_->messages;
  CommunicatorStats stats;
  impl_->log->count(stats);
  stats.messages = messages.messages();
  stats.bytes += messages.bytes();
  stats.wire_bytes += messages.wire_bytes();
  return stats;
}

void Communicator::set_timeout(std::chrono::milliseconds timeout) {
  impl_->timeout_ms.store(timeout.count());
}

void Communicator::abort(const std::string& message) {
  if (impl_->generation != fork_generation()) return;
  {
    const std::lock_guard lock(impl_->mutex);
    if (impl_->closed) return;
  }
  impl_->transport->fail(Failure{ErrorKind::kPeer, message});
}

void Communicator::close() {
  Impl& impl = *impl_;
  if (impl.generation != fork_generation()) return;
  std::deque<Impl::Item> abandoned;
  std::unique_lock lock(impl.mutex);
  if (impl.closed) return;
  impl.closed = true;
  abandoned.swap(impl.queue);
  impl.changed.notify_all();
  impl.closing.store(true);
  impl.transport->wake(Port::kCollectives);
  impl.changed.wait(lock, [&] { return !impl.busy; });  // what runs, in any thread, sees `closing`
  lock.unlock();
  impl.abandon(abandoned);
  impl.messages->close();
  if (impl.thread.joinable()) {
    if (impl.thread.get_id() == std::this_thread::get_id()) {
      impl.thread.detach();
    } else {
      impl.thread.join();
    }
  }
  lock.lock();
  const auto device = impl.device;
  lock.unlock();
  if (device != nullptr) device->close();
  impl.log->closes(impl.transport->failed());
  impl.transport->close();
}

}  // namespace dpcomm
