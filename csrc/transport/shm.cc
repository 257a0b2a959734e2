// Ranks as processes of one host: rings in a segment that all of them map.
//
// The segment is a memfd, which has no name that a dead process could leave behind and is not bound
// to the size of /dev/shm; peers open it through /proc. Where that is forbidden (another PID
// namespace, another user), or where DPCOMM_SHM_DIR names a folder, it is a file of mode 0600 that
// is unlinked as soon as all ranks have opened it.
//
// Start-up through the store, keys below the group's name:
//   rank 0  -> "offer"       where the memfd is, its size, slots and a nonce
//   rank r  -> "answer/r"    "ok" once it has attached, or why it could not
//   rank 0  -> "verdict"     "go", or "file" with a path and an offer, or the error for all
//
// A peer's life is seen by a POSIX record lock on byte r of the segment, which the kernel drops
// when the process dies, however it dies. Such locks are not inherited by fork: a forked worker
// that lives on keeps nothing alive, and its death releases nothing.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <random>
#include <sstream>
#include <thread>
#include <utility>

#include "base/env.h"
#include "transport/shared_arena.h"
#include "transport/transport.h"

namespace dpcomm {
namespace {

using std::chrono::milliseconds;

class FileDescriptor {
 public:
  explicit FileDescriptor(int fd = -1) : fd_(fd) {}
  FileDescriptor(FileDescriptor&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  FileDescriptor& operator=(FileDescriptor&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  ~FileDescriptor() {
    if (fd_ >= 0) ::close(fd_);
  }
  int get() const { return fd_; }
  bool valid() const { return fd_ >= 0; }

 private:
  int fd_;
};

/// What rank 0 offers. The nonce is at the end of the segment, so that a stranger's file is
/// refused.
struct Offer {
  pid_t pid = 0;
  int fd = -1;
  size_t slot_bytes = 0;
  uint64_t nonce = 0;

  std::string text() const { return str(pid, ' ', fd, ' ', slot_bytes, ' ', nonce); }
  static Offer parse(const std::string& text) {
    Offer offer;
    std::istringstream in(text);
    if (!(in >> offer.pid >> offer.fd >> offer.slot_bytes >> offer.nonce)) {
      throw internal_error("the store holds a damaged offer of a segment: '", text, "'");
    }
    return offer;
  }
};

size_t segment_bytes(const ArenaLayout& layout) { return layout.bytes() + kLine; }

/// Reserves all pages now: later there would be no error but SIGBUS.
bool reserve(int fd, size_t bytes) {
  int error;
  while ((error = posix_fallocate(fd, 0, static_cast<off_t>(bytes))) == EINTR) {
  }
  errno = error;
  return error == 0;
}

class ShmTransport final : public ArenaTransport {
 public:
  ShmTransport(const TransportConfig& config, ArenaLayout layout, FileDescriptor segment,
               uint64_t nonce)
      : ArenaTransport(config.rank, std::move(layout)), segment_(std::move(segment)) {
    bytes_ = segment_bytes(this->layout());
    struct stat status;
    if (fstat(segment_.get(), &status) != 0 || static_cast<size_t>(status.st_size) != bytes_) {
      throw internal_error("the segment that rank 0 offers has the wrong size");
    }
    void* memory = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_SHARED, segment_.get(), 0);
    if (memory == MAP_FAILED) {
      throw internal_error("cannot map ", bytes_, " bytes of shared memory: ", strerror(errno));
    }
    base_ = static_cast<std::byte*>(memory);
    madvise(base_, bytes_, MADV_DONTFORK);  // a forked worker must not hold or touch it
    madvise(base_, bytes_, MADV_HUGEPAGE);  // advice only
    auto* stored = reinterpret_cast<std::atomic<uint64_t>*>(base_ + bytes_ - kLine);
    if (config.rank == 0) stored->store(nonce);
    owner_ = getpid();
    try {
      if (stored->load() != nonce) {
        throw internal_error("the segment that rank 0 offers is not of this group");
      }
      lock_own_byte();
    } catch (...) {
      munmap(base_, bytes_);
      throw;
    }
    attach(base_);
  }

  ~ShmTransport() override {
    if (getpid() == owner_) munmap(base_, bytes_);  // a forked child does not have the mapping
  }

  std::vector<int> absent(milliseconds timeout) { return wait_for_all(timeout); }

  PeerState peer_state(int rank) const override {
    const RankLine& peer = line(rank);
    if (peer.state.load() == RankLine::kClosed) return PeerState::kClosed;
    if (static_cast<pid_t>(peer.pid.load()) == owner_) return PeerState::kAlive;
    struct flock lock = byte_lock(rank, F_WRLCK);
    if (fcntl(segment_.get(), F_GETLK, &lock) != 0) return PeerState::kAlive;  // cannot know
    if (lock.l_type != F_UNLCK) return PeerState::kAlive;
    // Nobody holds it: the peer is dead, unless it has just closed.
    return peer.state.load() == RankLine::kClosed ? PeerState::kClosed : PeerState::kDead;
  }

 private:
  static struct flock byte_lock(int rank, short type) {
    struct flock lock{};
    lock.l_type = type;
    lock.l_whence = SEEK_SET;
    lock.l_start = rank;
    lock.l_len = 1;
    return lock;
  }

  void lock_own_byte() {
    struct flock lock = byte_lock(rank(), F_WRLCK);
    if (fcntl(segment_.get(), F_SETLK, &lock) != 0) {
      throw internal_error("rank ", rank(),
                           " cannot lock its byte of the segment: ", strerror(errno),
                           " (is the rank started twice?)");
    }
  }

  FileDescriptor segment_;
  std::byte* base_ = nullptr;
  size_t bytes_ = 0;
  pid_t owner_ = 0;
};

/// The start-up of one rank.
class Rendezvous {
 public:
  explicit Rendezvous(const TransportConfig& config)
      : config_(config), deadline_(std::chrono::steady_clock::now() + config.timeout) {}
  ~Rendezvous() { unlink_file(); }

  std::unique_ptr<Transport> run() {
    auto transport = config_.rank == 0 ? lead() : follow();
    const std::vector<int> absent = transport->absent(left());
    if (!absent.empty()) throw missing(absent);
    return transport;
  }

 private:
  using Attached = std::unique_ptr<ShmTransport>;
  static constexpr milliseconds kGrace{5000};

  Attached lead() {
    const std::string folder = environment(Variable::SHM_DIR);
    try {
      Offer offer;
      FileDescriptor segment = create(folder, offer);
      auto transport = attach(offer, std::move(segment));
      set("offer", offer.text());
      std::string refusal;
      std::vector<int> absent;
      for (int rank = 1; rank < config_.world; ++rank) {
        std::string answer;
        if (!get(str("answer/", rank), answer)) {
          absent.push_back(rank);
        } else if (answer != "ok" && refusal.empty()) {
          refusal = str("rank ", rank, " cannot open the segment of rank 0: ", answer);
        }
      }
      unlink_file();
      if (!absent.empty()) throw missing(absent);
      if (!refusal.empty() && !folder.empty()) throw internal_error(refusal);
      if (!refusal.empty()) return lead_by_file("/dev/shm");
      set("verdict", "go");
      return transport;
    } catch (const Error& error) {
      unlink_file();
      set("verdict", str("error ", static_cast<int>(error.kind()), ' ', error.what()));
      throw;
    }
  }

  /// The way round where /proc does not lead to rank 0's memfd.
  Attached lead_by_file(const std::string& folder) {
    Offer offer;
    FileDescriptor segment = create(folder, offer);
    auto transport = attach(offer, std::move(segment));
    set("verdict", str("file ", path_, ' ', offer.text()));
    const std::vector<int> absent = transport->absent(left());
    unlink_file();
    if (!absent.empty()) throw missing(absent);
    return transport;
  }

  Attached follow() {
    std::string text;
    if (!get("offer", text)) throw missing({0});
    Attached transport;
    std::string answer = "ok";
    try {
      const Offer offer = Offer::parse(text);
      const std::string path = str("/proc/", offer.pid, "/fd/", offer.fd);
      transport = attach(offer, open_segment(path));
    } catch (const Error& error) {
      answer = error.what();
    }
    set(str("answer/", config_.rank), answer);
    deadline_ += kGrace;  // rank 0 waits for the others as long, and then says who is missing
    std::string verdict;
    if (!get("verdict", verdict)) {
      throw peer_error("rank 0 of group '", config_.name, "' went away during the start");
    }
    std::istringstream in(verdict);
    std::string word;
    in >> word;
    if (word == "go") return transport;
    if (word == "file") {
      transport.reset();
      std::string path;
      in >> path;
      std::getline(in, text);
      return attach(Offer::parse(text), open_segment(path));
    }
    int kind = static_cast<int>(ErrorKind::kInternal);
    in >> kind;
    std::string message;
    std::getline(in >> std::ws, message);
    throw Error(static_cast<ErrorKind>(kind), message);
  }

  /// Makes the segment and completes the offer; a smaller ring is tried where memory is short.
  FileDescriptor create(const std::string& folder, Offer& offer) {
    offer.pid = getpid();
    offer.nonce = (uint64_t{std::random_device()()} << 32) | std::random_device()();
    TransportConfig config = config_;
    size_t wanted = 0;
    for (int attempt = 0; attempt < 4; ++attempt) {
      const ArenaLayout layout{config.world, geometry_for(config)};
      FileDescriptor segment = create_file(folder, offer.nonce);
      offer.fd = segment.get();
      offer.slot_bytes = config.slot_bytes = layout.lanes[0].slot_bytes;
      const size_t bytes = segment_bytes(layout);
      wanted = wanted == 0 ? bytes : wanted;
      if (reserve(segment.get(), bytes)) return segment;
      const int error = errno;
      unlink_file();
      if (error != ENOSPC && error != ENOMEM) {
        throw internal_error("cannot reserve ", bytes,
                             " bytes of shared memory: ", strerror(error));
      }
      config.slot_bytes /= 4;
    }
    throw internal_error(
        "shared memory in ", folder.empty() ? "memory" : folder, " is full: group '", config_.name,
        "' of ", config_.world, " ranks needs ", wanted >> 20, " MiB (", wanted, " bytes), and ",
        segment_bytes(ArenaLayout{config.world, geometry_for(config)}),
        " bytes with the smallest slots; make it larger (docker: --shm-size), or unset "
        "DPCOMM_SHM_DIR");
  }

  FileDescriptor create_file(const std::string& folder, uint64_t nonce) {
    if (folder.empty()) {
      FileDescriptor segment(memfd_create("dpcomm", MFD_CLOEXEC));
      if (!segment.valid()) throw internal_error("memfd_create: ", strerror(errno));
      return segment;
    }
    std::ostringstream path;
    path << folder << "/dpcomm-" << std::hex << nonce;
    path_ = path.str();
    FileDescriptor segment(
        ::open(path_.c_str(), O_CREAT | O_EXCL | O_RDWR | O_CLOEXEC | O_NOFOLLOW, 0600));
    if (!segment.valid()) throw internal_error("cannot create ", path_, ": ", strerror(errno));
    return segment;
  }

  FileDescriptor open_segment(const std::string& path) {
    FileDescriptor segment(::open(path.c_str(), O_RDWR | O_CLOEXEC));
    if (!segment.valid()) throw internal_error("cannot open ", path, ": ", strerror(errno));
    return segment;
  }

  Attached attach(const Offer& offer, FileDescriptor segment) {
    return std::make_unique<ShmTransport>(config_, layout_of(offer), std::move(segment),
                                          offer.nonce);
  }

  ArenaLayout layout_of(const Offer& offer) const {
    TransportConfig config = config_;
    config.slot_bytes = offer.slot_bytes;
    return ArenaLayout{config.world, geometry_for(config)};
  }

  void unlink_file() {
    if (!path_.empty()) ::unlink(path_.c_str());
    path_.clear();
  }

  Error missing(const std::vector<int>& absent) const {
    std::string ranks;
    for (int rank : absent) ranks += str(ranks.empty() ? "" : ", ", rank);
    return timeout_error("group '", config_.name, "' of ", config_.world, " ranks: rank",
                         absent.size() > 1 ? "s " : " ", ranks, " did not come within ",
                         config_.timeout.count() / 1000.0, " s");
  }

  milliseconds left() const {
    const auto rest =
        std::chrono::duration_cast<milliseconds>(deadline_ - std::chrono::steady_clock::now());
    return std::max(rest, milliseconds(1));
  }
  void set(const std::string& key, const std::string& value) {
    config_.bootstrap->set(config_.name + "/" + key, value);
  }
  bool get(const std::string& key, std::string& value) {
    return config_.bootstrap->get(config_.name + "/" + key, left(), value);
  }

  const TransportConfig& config_;
  std::chrono::steady_clock::time_point deadline_;
  std::string path_;
};

}  // namespace

std::unique_ptr<Transport> make_shm_transport(const TransportConfig& config) {
  return Rendezvous(config).run();
}

}  // namespace dpcomm
