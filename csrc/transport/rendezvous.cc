#include "transport/rendezvous.h"

#include <unistd.h>

#include <algorithm>
#include <random>
#include <thread>
#include <utility>

#include "base/env.h"
#include "base/log.h"

namespace dpcomm {
namespace {

using std::chrono::milliseconds;

constexpr milliseconds kLook{100};          // how long a look at the store may take
constexpr milliseconds kGrace{400};         // for news of a decision that is due
constexpr milliseconds kReadPatience{500};  // for ranks to read of an error
constexpr milliseconds kGonePatience{300};  // from when a store fails until its process is gone
constexpr int kRounds = 2;
constexpr size_t kShrink = 4;  // factor between the sizes of slots that are tried

/// Rank 0 removes its file when all have opened it; the others do where it died before that.
struct FileRemover {
  std::string path;
  ~FileRemover() {
    if (!path.empty()) ::unlink(path.c_str());
  }
};

std::string segment_folder(int round) {
  const std::string folder = environment(Variable::SHM_DIR);
  return folder.empty() && round > 0 ? "/dev/shm" : folder;
}

}  // namespace

std::string here_key(const std::string& group, int rank) {
  return str("dpcomm/", group, "/here/", rank);
}

Rendezvous::Rendezvous(const TransportConfig& config)
    : config_(config), deadline_(Clock::now() + config.timeout), present_(config.world) {}

template <class Call>
auto Rendezvous::ask(Call&& call) {
  try {
    return call();
  } catch (const std::exception& error) {
    const auto* known = dynamic_cast<const Error*>(&error);
    if (known != nullptr && known->kind() != ErrorKind::kPeer) throw;
    if (config_.rank == 0 || !present_[0]) throw;
    // The store is often kept by rank 0.
    const auto patience = Clock::now() + kGonePatience;
    while (!present_[0]->gone()) {
      if (Clock::now() > patience) throw;
      std::this_thread::sleep_for(milliseconds(5));
    }
    throw died_at_start(config_.name, config_.world,
                        describe_rank(0, present_[0]->pid, present_[0]->host));
  }
}

std::unique_ptr<Transport> Rendezvous::run() {
  set(str("here/", config_.rank), Presence::own().text());
  auto transport = config_.rank == 0 ? lead() : follow();
  const auto deadline = std::max(deadline_, Clock::now() + kGrace);
  transport->probe_reach();
  transport->wait_for_all(config_, deadline);
  return transport;
}

// --- rank 0
// ------------------------------------------------------------------------------------------

Rendezvous::Attached Rendezvous::lead() {
  for (int round = 0;; ++round) {
    if (auto transport = lead_round(round)) return transport;
  }
}

/// The transport, or null if another round has to be tried.
Rendezvous::Attached Rendezvous::lead_round(int round) {
  std::string key = str("offer/", round);
  try {
    Offer offer;
    Attached transport = create(round, &offer.nonce);
    const Presence own = Presence::own();
    offer.pid = own.pid;
    offer.pid_namespace = own.pid_namespace;
    offer.born = own.born;
    offer.world = config_.world;
    offer.fd = transport->fd();
    offer.path = transport->path();
    offer.slot_bytes = transport->geometry(0).slot_bytes;
    set(key, offer.text());
    key = str("verdict/", round);
    const std::string refusal = collect_answers(*transport, round);
    transport->unlink();
    if (!refusal.empty() && round + 1 == kRounds) throw internal_error(refusal);
    set(key, refusal.empty() ? "go" : "again");
    if (refusal.empty()) return transport;
    if (log_enabled(LogLevel::kInfo)) log_line(LogLevel::kInfo, refusal + "; using a file");
    return nullptr;
  } catch (const std::exception& error) {
    report(key, error);
    throw;
  }
}

/// A segment with this rank attached. Smaller slots are tried where memory is short.
Rendezvous::Attached Rendezvous::create(int round, uint64_t* nonce) const {
  const std::string folder = segment_folder(round);
  std::random_device random;
  *nonce = (uint64_t{random()} << 32) | random();
  const size_t wanted = ShmTransport::segment_bytes(layout(config_.slot_bytes));
  for (size_t slot_bytes = config_.slot_bytes;;) {
    const ArenaLayout attempt = layout(slot_bytes);
    const size_t bytes = ShmTransport::segment_bytes(attempt);
    if (auto segment = Segment::create(folder, bytes, round > 0)) {
      if (bytes < wanted) {
        log_line(LogLevel::kWarn,
                 str("group '", config_.name, "': ", folder, " has no room for ", wanted,
                     " bytes of shared memory; using ", bytes, ", which is slower"));
      }
      return std::make_unique<ShmTransport>(0, attempt, std::move(*segment), *nonce);
    }
    slot_bytes = attempt.lanes[0].slot_bytes / kShrink;
    if (ShmTransport::segment_bytes(layout(slot_bytes)) == bytes) {
      throw internal_error(
          "no room for shared memory", folder.empty() ? "" : " in ", folder, ": group '",
          config_.name, "' of ", config_.world, " ranks needs ", (wanted >> 20) + 1, " MiB (",
          wanted, " bytes), or at least ", bytes, " bytes with the smallest slots; ",
          folder.empty() ? "free some memory"
                         : "enlarge the folder's file system (docker: --shm-size)");
    }
  }
}

/// Waits for the answers of all ranks. Returns why a rank cannot attach, or nothing.
std::string Rendezvous::collect_answers(const ShmTransport& transport, int round) {
  std::string refusal;
  std::vector<int> silent;
  const auto look = [&] {
    if (const auto failure = transport.failure()) throw Error(failure->kind, failure->message);
    watch(transport, 1, config_.world);
  };
  for (int rank = 1; rank < config_.world; ++rank) {
    std::string answer;
    if (!get(str("answer/", round, "/", rank), answer, look)) {
      silent.push_back(rank);
    } else if (const auto error = parse_error(answer)) {
      throw *error;
    } else if (const auto why = parse_answer(answer); why && refusal.empty()) {
      refusal = str("rank ", rank, " cannot open the segment of rank 0: ", *why);
    }
  }
  if (silent.empty()) return refusal;
  if (const auto error = decision(milliseconds(0))) throw *error;  // another rank was first
  auto ranks = attendance(&transport);
  for (const int rank : silent) {
    if (ranks[rank].attendance == Attendance::kThere) ranks[rank].attendance = Attendance::kStuck;
  }
  throw absent_ranks(config_.name, ranks, config_.timeout);
}

/// Tells the others of an error, and stays until those who are there have read of it: the store may
/// live in this process.
void Rendezvous::report(const std::string& key, const std::exception& error) noexcept {
  try {
    const auto* known = dynamic_cast<const Error*>(&error);
    set(key, error_text(known != nullptr ? *known : peer_error("rank 0: ", error.what())));
    deadline_ = Clock::now() + kReadPatience;
    for (int rank = 1; rank < config_.world; ++rank) {
      const Presence* there = presence(rank);
      std::string value;
      if (there != nullptr && !there->gone()) get(str("read/", rank), value);
    }
  } catch (...) {  // the store is gone, or the user is impatient: the error itself counts
  }
}

// --- the other ranks
// ---------------------------------------------------------------------------------

Rendezvous::Attached Rendezvous::follow() {
  std::string text;
  deadline_ += kGrace;  // rank 0, which may have come a little later, decides within its timeout
  if (!get("here/0", text)) give_up(nullptr);
  present_[0] = Presence::parse(text);
  for (int round = 0; round < kRounds; ++round) {
    if (auto transport = follow_round(round)) return transport;
  }
  throw internal_error("rank 0 of group '", config_.name, "' asked for one round too many");
}

/// The transport, or null if rank 0 wants another round.
Rendezvous::Attached Rendezvous::follow_round(int round) {
  std::string text, verdict;
  std::optional<Error> refusal;
  if (!get(str("offer/", round), text, [&] { watch_process(0); })) give_up(nullptr);
  throw_if_error(text);
  const Offer offer = Offer::parse(text);
  const FileRemover remover{offer.path};
  std::string answer = "ok";
  Attached transport;
  try {
    transport = attach(offer);
  } catch (const Error& error) {
    refusal = error;
    // What would be the same in another round is an error for all.
    answer = error.kind() == ErrorKind::kUsage ? error_text(error) : str("no ", error.what());
  }
  set(str("answer/", round, "/", config_.rank), answer);
  const auto look = [&] {
    watch_process(0);
    if (transport == nullptr) return;
    if (const auto failure = transport->failure()) throw Error(failure->kind, failure->message);
    watch(*transport, 0, 1);
  };
  if (!get(str("verdict/", round), verdict, look)) give_up(transport.get());
  throw_if_error(verdict);
  if (!parse_verdict(verdict)) return nullptr;
  if (transport == nullptr) throw *refusal;  // a second rank of this number is there
  return transport;
}

Rendezvous::Attached Rendezvous::attach(const Offer& offer) const {
  if (offer.world != config_.world) {
    const Presence own = Presence::own();
    throw usage_error("ranks disagree: ", describe_rank(0, present_[0]->pid, present_[0]->host),
                      " makes group '", config_.name, "' of ", offer.world, " ranks, but ",
                      describe_rank(config_.rank, own.pid, own.host), " one of ", config_.world);
  }
  const std::string path =
      offer.path.empty() ? str("/proc/", offer.pid, "/fd/", offer.fd) : offer.path;
  const ArenaLayout offered = layout(offer.slot_bytes);
  Segment segment = Segment::open(path, ShmTransport::segment_bytes(offered));
  return std::make_unique<ShmTransport>(config_.rank, offered, std::move(segment), offer.nonce);
}

/// Rank 0 does not come, or does not decide. Throws the same error on all ranks that are there.
void Rendezvous::give_up(ShmTransport* transport) {
  const Error error = decided(absent_ranks(config_.name, attendance(transport), config_.timeout));
  if (transport == nullptr) throw error;
  transport->raise(error);
}

/// The error of the lowest rank that is there (but rank 0), which decides for all.
Error Rendezvous::decided(const Error& own) {
  int lowest = 1;
  for (; lowest < config_.rank; ++lowest) {
    const Presence* there = presence(lowest);
    if (there != nullptr && !there->gone()) break;
  }
  const auto first = decision(lowest == config_.rank ? milliseconds(0) : kGrace);
  if (first) return *first;
  set("decision", error_text(own));
  return own;
}

/// What a rank has decided, waited for at most `patience`.
std::optional<Error> Rendezvous::decision(milliseconds patience) {
  std::string text;
  deadline_ = Clock::now() + patience;
  return get("decision", text) ? parse_error(text) : std::nullopt;
}

void Rendezvous::throw_if_error(const std::string& text) {
  const auto error = parse_error(text);
  if (!error) return;
  set(str("read/", config_.rank), "1");
  throw *error;
}

// --- both
// --------------------------------------------------------------------------------------------

ArenaLayout Rendezvous::layout(size_t slot_bytes) const {
  TransportConfig config = config_;
  config.slot_bytes = slot_bytes;
  return ArenaLayout{config.world, geometry_for(config)};
}

/// Who is there: by the segment where this rank has one, and by what ranks said at once.
std::vector<Attendant> Rendezvous::attendance(const ShmTransport* transport) {
  std::vector<Attendant> ranks;
  if (transport != nullptr) ranks = transport->attendance(RankLine::kAttached);
  ranks.resize(config_.world);
  for (int rank = 0; rank < config_.world; ++rank) {
    Attendant& each = ranks[rank];
    each.rank = rank;
    // Rank 0 would have decided; the others can do no more than come where there is no segment.
    const bool undecided = rank == 0 && config_.rank != 0;
    if (each.attendance != Attendance::kAbsent) {
      if (undecided) each.attendance = Attendance::kStuck;
      continue;
    }
    const Presence* there = rank == config_.rank ? nullptr : presence(rank);
    if (there == nullptr && rank != config_.rank) continue;
    const Presence own = there == nullptr ? Presence::own() : *there;
    each.name = describe_rank(rank, own.pid, own.host);
    each.attendance = undecided || transport != nullptr ? Attendance::kStuck : Attendance::kThere;
  }
  return ranks;
}

/// Throws PeerError if one of the ranks [first, last) has come and died.
void Rendezvous::watch(const ShmTransport& transport, int first, int last) {
  for (int rank = first; rank < last; ++rank) {
    if (transport.peer_state(rank) == PeerState::kDead) {
      throw died_at_start(config_.name, config_.world, transport.describe(rank));
    }
    if (!transport.has_come(rank)) watch_process(rank);
  }
}

/// The process of a rank, once it has said so; asks the store without waiting.
const Presence* Rendezvous::presence(int rank) {
  if (!present_[rank]) {
    std::string text;
    const bool there = ask([&] {
      return config_.bootstrap->get(here_key(config_.name, rank), milliseconds(0), text);
    });
    if (there) present_[rank] = Presence::parse(text);
  }
  return present_[rank] ? &*present_[rank] : nullptr;
}

/// Throws PeerError if the rank has said that it is there, and is there no more.
void Rendezvous::watch_process(int rank) {
  const Presence* there = presence(rank);
  if (there == nullptr || !there->gone()) return;
  throw died_at_start(config_.name, config_.world, describe_rank(rank, there->pid, there->host));
}

void Rendezvous::set(const std::string& key, const std::string& value) {
  ask([&] { config_.bootstrap->set(str("dpcomm/", config_.name, "/", key), value); });
}

bool Rendezvous::get(const std::string& key, std::string& value,
                     const std::function<void()>& look) {
  const std::string full = str("dpcomm/", config_.name, "/", key);
  for (;;) {
    const auto left = std::chrono::duration_cast<milliseconds>(deadline_ - Clock::now());
    const milliseconds limit = std::clamp(left, milliseconds(0), kLook);
    if (ask([&] { return config_.bootstrap->get(full, limit, value); })) return true;
    if (look) look();
    config_.bootstrap->look();
    if (left <= kLook) return false;
  }
}

}  // namespace dpcomm
