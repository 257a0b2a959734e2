// Memory that the processes of a host share: a file that has no name, or has one only for as long
// as others need it to open the file.
#pragma once

#include <cstddef>
#include <optional>
#include <string>

namespace dpcomm {

class Segment {
 public:
  /// A segment of `bytes` zeros, all pages reserved: later there would be no error but SIGBUS.
  /// Nothing if there is not so much memory.
  ///
  /// `folder` empty: a memfd; else a file in that folder, under a name that others can open until
  /// unlink() if `named`, else without a name. Both of mode 0600. Throws UsageError if the folder
  /// cannot be used.
  static std::optional<Segment> create(const std::string& folder, size_t bytes, bool named);
  /// Throws InternalError if there is nothing to open, or it is not `bytes` long.
  static Segment open(const std::string& path, size_t bytes);

  Segment(Segment&& other) noexcept;
  Segment& operator=(Segment&& other) noexcept;
  ~Segment();  ///< closes, and removes the name

  int fd() const { return fd_; }
  /// The name that others can open, if there is one.
  const std::string& path() const { return path_; }
  void unlink();

 private:
  explicit Segment(int fd) : fd_(fd) {}

  int fd_;
  std::string path_;
};

}  // namespace dpcomm
