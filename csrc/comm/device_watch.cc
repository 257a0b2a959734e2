// The watchdog of a communicator's operations on a device. It looks at what the device has done and
// at what its kernels wait for; a wait that lasts too long, or for a rank that is gone, ends the
// communicator on all ranks and makes the kernels leave.
#include <algorithm>

#include "comm/device_side.h"

namespace dpcomm {
namespace {

constexpr std::chrono::milliseconds kTick{20};
constexpr std::chrono::milliseconds kLasting{50};  // a wait that is worth a look at the others
constexpr int64_t kStillNs = 500'000'000;          // without a sign of life (cpu/diagnosis.cc)

double in_seconds(std::chrono::milliseconds time) { return time.count() / 1000.0; }

bool is_same_wait(const WaitRecord& a, const WaitRecord& b) {
  return a.state == b.state && a.cta == b.cta && a.lane == b.lane && a.step == b.step &&
         a.peer == b.peer && a.wanted == b.wanted && a.sequence == b.sequence;
}

/// "CTA 0, lane 0, step 3, message 5 seen, 6 wanted".
std::string text_of(const WaitRecord& wait) {
  const char* what = "message ";
  if (wait.state == static_cast<uint32_t>(WaitKind::kCredit)) what = "credit ";
  if (wait.state == static_cast<uint32_t>(WaitKind::kPacket)) what = "packet of epoch ";
  return str("CTA ", wait.cta, ", lane ", wait.lane, ", step ", wait.step, ", ", what, wait.seen,
             " seen, ", wait.wanted, " wanted");
}

/// What a rank does while another waits for it in `operation`.
std::string deed_of(const Transport& transport, const Diagnosis& diagnosis, int rank,
                    const OpRecord& operation) {
  const OpRecord last = transport.announced(rank, Place::kDevice);
  const std::string who = transport.describe(rank);
  if (last.sequence < operation.sequence) {
    return str(who, " has not called it (", diagnosis.history(rank), ")");
  }
  if (last.finished >= operation.sequence) return who + " has finished it";
  const int64_t silence_ns = elapsed_ns(last.alive_ns);
  if (silence_ns > kStillNs) {
    return str(who, " has given no sign of life for ", silence_ns / 100'000'000 / 10.0, " s (",
               diagnosis.history(rank), ")");
  }
  if (last.stage == static_cast<uint8_t>(Stage::kBehind)) {
    return who + " has called it, but its device is busy with what its stream does before";
  }
  const OpRecord now = transport.announced_at(rank, last.finished + 1, Place::kDevice);
  return str(who, " is in ", describe(now.sequence > 0 ? now : last));
}

}  // namespace

void DeviceSide::watch() {
  try {
    engine()->adopt_thread();
  } catch (const Error&) {  // every other call will tell
  }
  std::unique_lock lock(mutex_);
  while (!stopping_) {
    if (flying_.empty() && graph_limit_.count() == 0) {
      changed_.wait(lock);
      continue;
    }
    changed_.wait_for(lock, kTick, [this] { return stopping_; });
    lock.unlock();
    tick();
    lock.lock();
  }
}

void DeviceSide::tick() {
  const auto engine = this->engine();
  Failure failure;
  try {
    if (transport_->failed()) engine->abort();
    if (engine->aborted()) {
      advance();
      return;
    }
    // First what needs no call of CUDA: those may block while a launch does.
    look_at_waits();
    advance();
    check();
    return;
  } catch (const Error& error) {
    failure = Failure{error.kind(), error.what()};
  } catch (const std::exception& error) {
    failure = Failure{ErrorKind::kInternal, error.what()};
  }
  transport_->fail(failure);
  engine->abort();
  note_failure(failure);
}

/// In the flight recorder, of all operations that have not ended. What came first counts.
void DeviceSide::note_failure(const Failure& own) {
  const Failure failure = transport_->failure().value_or(own);
  {
    const std::lock_guard lock(mutex_);
    for (const Flying& flying : flying_) log_->device_fails(flying.flight, failure);
  }
  log_->failed();
}

/// Takes note of what is complete.
void DeviceSide::advance() {
  const auto engine = this->engine();
  if (engine == nullptr) return;
  Stage stage = Stage::kBehind;
  for (auto flying = first(); flying; flying = first()) {
    const Progress progress = engine->progress(flying->ticket);
    if (progress == Progress::kComplete && !engine->aborted()) look_for_disagreement(*engine);
    const std::lock_guard lock(mutex_);
    if (flying_.empty() || flying_.front().ticket != flying->ticket) continue;  // another thread
    if (progress != Progress::kComplete) {
      if (progress == Progress::kRunning && !flying_.front().begun) {
        flying_.front().begun = true;
        flying_.front().since = Clock::now();
        log_->device_begins(flying_.front().flight);
      }
      if (progress == Progress::kRunning) stage = Stage::kRunning;
      break;
    }
    const bool begun = flying_.front().begun;
    flying_.pop_front();
    if (engine->aborted()) {  // left, not finished
      if (const auto failure = transport_->failure()) log_->device_fails(flying->flight, *failure);
      continue;
    }
    if (!begun) log_->device_begins(flying->flight);
    log_->device_ends(flying->flight);
    shown_.finished = flying->record.sequence;
    if (flying_.empty()) shown_.finished = shown_.sequence;  // what came after is part of graphs
  }
  show(stage);
}

void DeviceSide::show(Stage stage) {
  const std::lock_guard lock(mutex_);
  if (shown_.sequence == 0) return;
  OpRecord record = shown_;
  record.stage = static_cast<uint8_t>(stage);
  announce(record);
}

OpRecord DeviceSide::operation_of(const WaitRecord& wait) const {
  const OpRecord known =
      transport_->announced_at(transport_->rank(), wait.sequence, Place::kDevice);
  return known.sequence > 0 ? known : transport_->announced(transport_->rank(), Place::kDevice);
}

std::chrono::milliseconds DeviceSide::limit_of(const WaitRecord& wait) {
  const std::lock_guard lock(mutex_);
  for (const Flying& flying : flying_) {
    if (flying.record.sequence == wait.sequence) return flying.limit;
  }
  return graph_limit_.count() > 0 ? graph_limit_ : std::chrono::milliseconds(INT32_MAX);
}

/// Throws if a kernel has found a message of another operation, and left.
void DeviceSide::look_for_disagreement(const DeviceEngine& engine) const {
  for (const WaitRecord& wait : engine.waits()) {
    if (wait.state == static_cast<uint32_t>(WaitKind::kDisagree)) throw_disagreement(wait);
  }
}

/// Notes since when each wait of the kernels lasts.
void DeviceSide::look_at_waits() {
  std::vector<Waiting> now;
  for (const WaitRecord& wait : engine()->waits()) {
    if (wait.state == static_cast<uint32_t>(WaitKind::kDisagree)) throw_disagreement(wait);
    const auto before = std::find_if(waiting_.begin(), waiting_.end(), [&](const Waiting& each) {
      return is_same_wait(each.record, wait);
    });
    now.push_back({wait, before == waiting_.end() ? Clock::now() : before->since});
  }
  waiting_ = std::move(now);
  for (const Waiting& each : waiting_) {
    const auto limit = limit_of(each.record);
    if (Clock::now() - each.since > limit) throw_timeout(operation_of(each.record), limit);
  }
}

void DeviceSide::throw_disagreement(const WaitRecord& wait) const {
  const OpRecord operation = operation_of(wait);
  diagnosis_.check_disagreement(transport_->announced(transport_->rank(), Place::kDevice));
  diagnosis_.check_disagreement(operation);
  throw usage_error("ranks disagree: ", transport_->describe(transport_->rank()), " runs ",
                    describe(operation), " on its device, but ", transport_->describe(wait.peer),
                    " sent a message of another operation (", diagnosis_.history(wait.peer), ")");
}

/// Throws if the first operation cannot come to its end, or takes too long.
void DeviceSide::check() {
  const auto flying = first();
  if (!flying) {
    check_graphs();
    return;
  }
  const auto now = Clock::now();
  const bool lasts = (flying->begun && now - flying->since > kLasting) ||
                     std::any_of(waiting_.begin(), waiting_.end(),
                                 [&](const Waiting& each) { return now - each.since > kLasting; });
  if (!lasts) return;
  diagnosis_.check_disagreement(transport_->announced(transport_->rank(), Place::kDevice));
  diagnosis_.check_disagreement(flying->record);
  try {
    diagnosis_.check_peers(flying->record);
    peers_missing_ = false;
  } catch (const Error&) {
    // Once more in the next turn: what a rank wrote before it went may end the operation yet.
    if (peers_missing_) throw;
    peers_missing_ = true;
  }
  if (flying->begun && now - flying->since > flying->limit) {
    throw_timeout(flying->record, flying->limit);
  }
}

/// Throws if a graph waits for a rank that is gone.
void DeviceSide::check_graphs() {
  for (const Waiting& each : waiting_) {
    if (Clock::now() - each.since < kLasting) continue;
    const int peer = static_cast<int>(each.record.peer);
    const PeerState state = transport_->peer_state(peer);
    if (state == PeerState::kAlive) continue;
    throw peer_error(transport_->describe(peer),
                     state == PeerState::kClosed ? " has closed its communicator" : " died", " (",
                     diagnosis_.history(peer), "); noticed by ",
                     transport_->describe(transport_->rank()), " in ",
                     describe(operation_of(each.record)), " of a graph");
  }
}

/// "rank 1 (pid 4711): CTA 0, lane 0, step 3, message 5 seen, 6 wanted; ...", one for each rank
/// that it waits for, then what these ranks do.
std::string DeviceSide::waits_text(const OpRecord& operation) const {
  std::vector<int> peers;
  std::vector<std::string> texts;
  for (const Waiting& each : waiting_) {
    const int peer = static_cast<int>(each.record.peer);
    if (std::find(peers.begin(), peers.end(), peer) != peers.end()) continue;
    peers.push_back(peer);
    texts.push_back(transport_->describe(peer) + ": " + text_of(each.record));
  }
  std::string reason = diagnosis_.not_called(operation);
  if (reason.empty()) {
    std::vector<std::string> deeds;
    for (int rank = 0; rank < transport_->world(); ++rank) {
      const bool waited = std::find(peers.begin(), peers.end(), rank) != peers.end();
      if (rank == transport_->rank() || (!waited && !peers.empty())) continue;
      deeds.push_back(deed_of(*transport_, diagnosis_, rank, operation));
    }
    reason = joined(deeds, "; ");
  }
  const std::string waits = texts.empty() ? "its device" : joined(texts, "; ");
  return reason.empty() ? waits : waits + "; " + reason;
}

void DeviceSide::throw_timeout(const OpRecord& operation, std::chrono::milliseconds limit) const {
  throw timeout_error(transport_->describe(transport_->rank()), " waited ", in_seconds(limit),
                      " s in ", describe(operation), " for ", waits_text(operation));
}

}  // namespace dpcomm
