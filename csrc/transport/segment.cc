#include "transport/segment.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <random>
#include <utility>

#include "base/error.h"

namespace dpcomm {
namespace {

constexpr mode_t kMode = 0600;

Error unusable(const std::string& folder, int error) {
  return usage_error("cannot make shared memory in ", folder, ": ", strerror(error),
                     "; DPCOMM_SHM_DIR has to name a folder that can be written to");
}

std::string fresh_name(const std::string& folder) {
  std::random_device random;
  char digits[17];
  std::snprintf(digits, sizeof(digits), "%08x%08x", random(), random());
  return folder + "/dpcomm-" + digits;
}

int open_named(const std::string& path, const std::string& folder) {
  const int fd = ::open(path.c_str(), O_CREAT | O_EXCL | O_RDWR | O_CLOEXEC | O_NOFOLLOW, kMode);
  if (fd < 0) throw unusable(folder, errno);
  return fd;
}

/// A file that never had a name, or, where the file system cannot do that, has lost it.
int open_nameless(const std::string& folder) {
  const int fd = ::open(folder.c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC, kMode);
  if (fd >= 0) return fd;
  if (errno != EOPNOTSUPP && errno != EISDIR && errno != EINVAL) throw unusable(folder, errno);
  const std::string path = fresh_name(folder);
  const int named = open_named(path, folder);
  ::unlink(path.c_str());
  return named;
}

}  // namespace

Segment::Segment(Segment&& other) noexcept
    : fd_(std::exchange(other.fd_, -1)), path_(std::exchange(other.path_, {})) {}

Segment& Segment::operator=(Segment&& other) noexcept {
  std::swap(fd_, other.fd_);
  std::swap(path_, other.path_);
  return *this;
}

Segment::~Segment() {
  unlink();
  if (fd_ >= 0) ::close(fd_);
}

void Segment::unlink() {
  if (!path_.empty()) ::unlink(path_.c_str());
  path_.clear();
}

std::optional<Segment> Segment::create(const std::string& folder, size_t bytes, bool named) {
  Segment segment(-1);
  if (folder.empty()) {
    segment.fd_ = memfd_create("dpcomm", MFD_CLOEXEC);
    if (segment.fd_ < 0) throw internal_error("memfd_create: ", strerror(errno));
    if (fchmod(segment.fd_, kMode) != 0) throw internal_error("fchmod: ", strerror(errno));
  } else if (named) {
    const std::string path = fresh_name(folder);
    segment.fd_ = open_named(path, folder);
    segment.path_ = path;
  } else {
    segment.fd_ = open_nameless(folder);
  }
  int error;
  while ((error = posix_fallocate(segment.fd_, 0, static_cast<off_t>(bytes))) == EINTR) {
  }
  if (error == 0) return segment;
  if (error == ENOSPC || error == ENOMEM || error == EDQUOT) return std::nullopt;
  throw internal_error("cannot reserve ", bytes, " bytes of shared memory: ", strerror(error));
}

Segment Segment::open(const std::string& path, size_t bytes) {
  Segment segment(::open(path.c_str(), O_RDWR | O_CLOEXEC | O_NONBLOCK | O_NOCTTY));
  if (segment.fd_ < 0) {
    // The name goes as soon as all ranks have attached.
    const char* hint = errno == ENOENT ? " (is the rank started twice, or rank 0 gone?)" : "";
    throw internal_error("cannot open ", path, ": ", strerror(errno), hint);
  }
  struct stat status;
  if (fstat(segment.fd_, &status) != 0 || !S_ISREG(status.st_mode) ||
      static_cast<size_t>(status.st_size) != bytes) {
    throw internal_error(path, " is not a segment of ", bytes, " bytes");
  }
  return segment;
}

}  // namespace dpcomm
