// Ranks as processes of one host: rings in a segment that all of them map.
//
// The segment is a memfd, which has no name that a dead process could leave behind and is not bound
// to the size of /dev/shm; DPCOMM_SHM_DIR puts it into a folder, without a name there either. Peers
// open it through /proc/<pid>/fd. Where that is forbidden (another PID namespace, another user, a
// process that may not be traced) the start is made once more with a file that has a name, from
// when the others are known to be there until all of them have opened it.
//
// A peer's life is seen by a POSIX record lock on byte r of the segment, which the kernel drops
// when the process dies, however it dies. Such locks are not inherited by fork: a forked worker
// that lives on keeps nothing alive, and its death releases nothing.
//
// How the ranks meet is in rendezvous.cc.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <random>
#include <utility>

#include "transport/rendezvous.h"

namespace dpcomm {
namespace {

/// A number that only this process has, also where pids repeat (PID namespaces).
uint64_t process_number() {
  static const uint64_t random = [] {
    std::random_device source;
    return (uint64_t{source()} << 32) | source();
  }();
  return random ^ (static_cast<uint64_t>(getpid()) * 0x9e3779b97f4a7c15u);
}

struct flock byte_lock(int rank, short type) {
  struct flock lock{};
  lock.l_type = type;
  lock.l_whence = SEEK_SET;
  lock.l_start = rank;
  lock.l_len = 1;
  return lock;
}

}  // namespace

ShmTransport::ShmTransport(int rank, ArenaLayout layout, Segment segment, uint64_t nonce)
    : ArenaTransport(rank, std::move(layout)),
      segment_(std::move(segment)),
      bytes_(segment_bytes(this->layout())),
      owner_(getpid()) {
  void* memory = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_SHARED, segment_.fd(), 0);
  if (memory == MAP_FAILED) {
    throw internal_error("cannot map ", bytes_, " bytes of shared memory: ", strerror(errno));
  }
  base_ = static_cast<std::byte*>(memory);
  madvise(base_, bytes_, MADV_DONTFORK);  // a forked worker must not hold or touch it
  madvise(base_, bytes_, MADV_HUGEPAGE);  // advice only
  auto* stored = reinterpret_cast<std::atomic<uint64_t>*>(base_ + bytes_ - kLine);
  if (rank == 0) stored->store(nonce);
  try {
    if (stored->load() != nonce) {
      throw internal_error("the segment that rank 0 offers is not of this group");
    }
    lock_own_byte();
  } catch (...) {
    munmap(base_, bytes_);
    throw;
  }
  attach(base_, process_number());
}

ShmTransport::~ShmTransport() {
  if (getpid() == owner_) munmap(base_, bytes_);  // a forked child does not have the mapping
}

void ShmTransport::lock_own_byte() {
  struct flock lock = byte_lock(rank(), F_WRLCK);
  if (fcntl(segment_.fd(), F_SETLK, &lock) != 0) {
    throw internal_error("rank ", rank(), " cannot lock its byte of the segment: ", strerror(errno),
                         " (is the rank started twice?)");
  }
}

PeerState ShmTransport::peer_state(int rank) const {
  const RankLine& peer = line(rank);
  const uint32_t state = peer.state.load();
  if (state == RankLine::kClosed) return PeerState::kClosed;
  if (state == 0) return PeerState::kAlive;  // it has not come: nobody knows
  if (peer.process.load() == process_number()) return PeerState::kAlive;
  struct flock lock = byte_lock(rank, F_WRLCK);
  if (fcntl(segment_.fd(), F_GETLK, &lock) != 0) return PeerState::kAlive;  // cannot know
  if (lock.l_type != F_UNLCK) return PeerState::kAlive;
  // Nobody holds it: the peer is dead, unless it has just closed.
  return peer.state.load() == RankLine::kClosed ? PeerState::kClosed : PeerState::kDead;
}

std::unique_ptr<Transport> make_shm_transport(const TransportConfig& config) {
  return Rendezvous(config).run();
}

}  // namespace dpcomm
