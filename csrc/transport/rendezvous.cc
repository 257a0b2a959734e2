#include "transport/rendezvous.h"

#include <signal.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <fstream>
#include <random>
#include <sstream>
#include <utility>

#include "base/env.h"
#include "base/log.h"

namespace dpcomm {
namespace {

using std::chrono::milliseconds;

constexpr milliseconds kLook{100};          // how long a look at the store may take
constexpr milliseconds kGrace{2000};        // for news of a decision that is due
constexpr milliseconds kReadPatience{500};  // for ranks to read of an error
constexpr int kRounds = 2;
constexpr size_t kShrink = 4;  // factor between the sizes of slots that are tried

/// Names the PID namespace of this process; 0 if that cannot be known.
uint64_t pid_namespace() {
  struct stat status;
  return stat("/proc/self/ns/pid", &status) == 0 ? status.st_ino : 0;
}

/// True if there is no such process in this PID namespace, or nothing of it but its exit status.
bool is_gone(pid_t pid) {
  std::ifstream file(str("/proc/", pid, "/stat"));
  if (!file) return kill(pid, 0) != 0 && errno == ESRCH;
  std::string line;
  std::getline(file, line);
  const size_t name_end = line.rfind(')');
  const char state = name_end + 2 < line.size() ? line[name_end + 2] : '?';
  return state == 'Z' || state == 'X';
}

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

/// Where rank 0's segment is.
struct Rendezvous::Offer {
  pid_t pid = 0;
  uint64_t pid_namespace = 0;
  int fd = -1;
  size_t slot_bytes = 0;
  uint64_t nonce = 0;
  std::string path;  // of a file with a name

  std::string text() const {
    return str("segment ", pid, ' ', pid_namespace, ' ', fd, ' ', slot_bytes, ' ', nonce, ' ',
               path);
  }
  static Offer parse(const std::string& text) {
    Offer offer;
    std::istringstream in(text);
    std::string word;
    if (!(in >> word >> offer.pid >> offer.pid_namespace >> offer.fd >> offer.slot_bytes >>
          offer.nonce)) {
      throw internal_error("the store holds a damaged offer of a segment: '", text, "'");
    }
    std::getline(in >> std::ws, offer.path);
    return offer;
  }
};

Rendezvous::Rendezvous(const TransportConfig& config)
    : config_(config), deadline_(Clock::now() + config.timeout) {}

std::unique_ptr<Transport> Rendezvous::run() {
  set(str("here/", config_.rank), "1");
  auto transport = config_.rank == 0 ? lead() : follow();
  const auto deadline = std::max(deadline_, Clock::now() + kGrace);
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
    offer.pid = getpid();
    offer.pid_namespace = pid_namespace();
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
  std::vector<int> absent;
  for (int rank = 1; rank < config_.world; ++rank) {
    std::string answer;
    const auto look = [&] { watch(transport, 1, config_.world); };
    if (!get(str("answer/", round, "/", rank), answer, look)) {
      absent.push_back(rank);
    } else if (answer != "ok" && refusal.empty()) {
      refusal = str("rank ", rank, " cannot open the segment of rank 0: ", answer);
    }
  }
  if (!absent.empty()) throw absent_ranks(config_, absent);
  return refusal;
}

/// Tells the others of an error, and stays until those who are there have read of it: the store may
/// live in this process.
void Rendezvous::report(const std::string& key, const std::exception& error) noexcept {
  try {
    const auto* known = dynamic_cast<const Error*>(&error);
    const ErrorKind kind = known != nullptr ? known->kind() : ErrorKind::kPeer;
    set(key, str("error ", static_cast<int>(kind), ' ',
                 known != nullptr ? "" : "rank 0: ", error.what()));
    deadline_ = Clock::now() + kReadPatience;
    for (int rank = 1; rank < config_.world; ++rank) {
      std::string value;
      if (config_.bootstrap->get(str("dpcomm/", config_.name, "/here/", rank), milliseconds(0),
                                 value)) {
        get(str("read/", rank), value);
      }
    }
  } catch (...) {  // the store is gone, or the user is impatient: the error itself counts
  }
}

// --- the other ranks
// ---------------------------------------------------------------------------------

Rendezvous::Attached Rendezvous::follow() {
  for (int round = 0; round < kRounds; ++round) {
    std::string text, verdict, answer = "ok";
    if (!get(str("offer/", round), text)) rank_0_is_missing();
    throw_if_error(text);
    const Offer offer = Offer::parse(text);
    const FileRemover remover{offer.path};
    Attached transport;
    try {
      transport = attach(offer);
    } catch (const Error& error) {
      answer = error.what();
    }
    set(str("answer/", round, "/", config_.rank), answer);
    deadline_ = Clock::now() + config_.timeout + kGrace;  // rank 0 decides within its timeout
    const auto look = [&] {
      if (transport != nullptr) return watch(*transport, 0, 1);
      if (offer.pid_namespace == pid_namespace() && is_gone(offer.pid)) {
        throw died_at_start(config_, describe_rank(0, offer.pid));
      }
    };
    if (!get(str("verdict/", round), verdict, look)) rank_0_is_missing();
    throw_if_error(verdict);
    if (verdict != "go") continue;
    if (transport == nullptr)
      throw internal_error(answer);  // a second rank of this number is there
    return transport;
  }
  throw internal_error("rank 0 of group '", config_.name, "' asked for one round too many");
}

Rendezvous::Attached Rendezvous::attach(const Offer& offer) const {
  const std::string path =
      offer.path.empty() ? str("/proc/", offer.pid, "/fd/", offer.fd) : offer.path;
  const ArenaLayout offered = layout(offer.slot_bytes);
  Segment segment = Segment::open(path, ShmTransport::segment_bytes(offered));
  return std::make_unique<ShmTransport>(config_.rank, offered, std::move(segment), offer.nonce);
}

void Rendezvous::rank_0_is_missing() {
  std::vector<int> absent{0};
  for (int rank = 1; rank < config_.world; ++rank) {
    std::string value;
    if (!get(str("here/", rank), value)) absent.push_back(rank);
  }
  throw absent_ranks(config_, absent);
}

void Rendezvous::throw_if_error(const std::string& text) {
  std::istringstream in(text);
  std::string word, message;
  int kind = static_cast<int>(ErrorKind::kInternal);
  in >> word;
  if (word != "error") return;
  in >> kind;
  std::getline(in >> std::ws, message, '\0');
  set(str("read/", config_.rank), "1");
  throw Error(static_cast<ErrorKind>(kind), message);
}

// --- both
// --------------------------------------------------------------------------------------------

ArenaLayout Rendezvous::layout(size_t slot_bytes) const {
  TransportConfig config = config_;
  config.slot_bytes = slot_bytes;
  return ArenaLayout{config.world, geometry_for(config)};
}

/// Throws PeerError if one of the ranks [first, last) has come and died.
void Rendezvous::watch(const ShmTransport& transport, int first, int last) const {
  for (int rank = first; rank < last; ++rank) {
    if (transport.peer_state(rank) == PeerState::kDead)
      throw died_at_start(config_, transport.describe(rank));
  }
}

void Rendezvous::set(const std::string& key, const std::string& value) {
  config_.bootstrap->set(str("dpcomm/", config_.name, "/", key), value);
}

bool Rendezvous::get(const std::string& key, std::string& value,
                     const std::function<void()>& look) {
  for (;;) {
    const auto left = std::chrono::duration_cast<milliseconds>(deadline_ - Clock::now());
    const milliseconds limit = std::clamp(left, milliseconds(0), kLook);
    if (config_.bootstrap->get(str("dpcomm/", config_.name, "/", key), limit, value)) return true;
    if (look) look();
    config_.bootstrap->look();
    if (left <= kLook) return false;
  }
}

}  // namespace dpcomm
