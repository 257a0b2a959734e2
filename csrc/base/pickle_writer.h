// Values in the form that Python's pickle.load() reads (protocol 2). Own, after CPython's
// documentation of the module pickletools.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace dpcomm {

/// Appends values to a string. Containers are opened, filled and closed by the caller; a dict gets
/// key, value, key, value.
class PickleWriter {
 public:
  PickleWriter() : bytes_("\x80\x02") {}

  void open_dict() { bytes_ += "}("; }
  void close_dict() { bytes_ += 'u'; }
  void open_list() { bytes_ += "]("; }
  void close_list() { bytes_ += 'e'; }
  /// Makes a tuple of the two values written last.
  void pair() { bytes_ += '\x86'; }

  void text(std::string_view value) {  // UTF-8
    bytes_ += 'X';
    little_endian(value.size(), 4);
    bytes_ += value;
  }
  void number(int64_t value) {
    bytes_ += "\x8a\x08";
    little_endian(static_cast<uint64_t>(value), 8);
  }
  void real(double value) {
    uint64_t bits;
    static_assert(sizeof(bits) == sizeof(value));
    __builtin_memcpy(&bits, &value, sizeof(bits));
    bytes_ += 'G';
    for (int shift = 56; shift >= 0; shift -= 8) bytes_ += static_cast<char>(bits >> shift);
  }
  void boolean(bool value) { bytes_ += value ? '\x88' : '\x89'; }
  void none() { bytes_ += 'N'; }

  /// Everything, complete.
  std::string finish() { return bytes_ + '.'; }

 private:
  void little_endian(uint64_t value, int count) {
    for (int i = 0; i < count; ++i) bytes_ += static_cast<char>(value >> (8 * i));
  }

  std::string bytes_;
};

}  // namespace dpcomm
