#include "base/text.h"

#include <cstdint>

namespace dpcomm {
namespace {

/// Bytes of the UTF-8 character that `text` begins with; 0 if it is not valid.
size_t character_bytes(std::string_view text) {
  const auto byte = [&](size_t i) { return static_cast<uint8_t>(text[i]); };
  const uint8_t first = byte(0);
  if (first < 0x80) return 1;
  const size_t bytes = first >= 0xf0 ? 4 : first >= 0xe0 ? 3 : 2;
  if (first < 0xc2 || first > 0xf4 || text.size() < bytes) return 0;
  for (size_t i = 1; i < bytes; ++i) {
    if (byte(i) < 0x80 || byte(i) > 0xbf) return 0;
  }
  if (first == 0xe0 && byte(1) < 0xa0) return 0;  // longer than need be
  if (first == 0xed && byte(1) > 0x9f) return 0;  // a surrogate
  if (first == 0xf0 && byte(1) < 0x90) return 0;
  if (first == 0xf4 && byte(1) > 0x8f) return 0;  // beyond the last character
  return bytes;
}

}  // namespace

std::string printable(std::string_view text, size_t limit) {
  std::string clean;
  clean.reserve(text.size() < limit ? text.size() : limit);
  for (size_t at = 0; at < text.size();) {
    const size_t bytes = character_bytes(text.substr(at));
    const auto first = static_cast<uint8_t>(text[at]);
    const bool control = (first < 0x20 && first != '\n') || first == 0x7f;
    const size_t used = bytes == 0 ? 1 : bytes;
    const size_t wanted = bytes == 0 || control ? 1 : bytes;
    if (clean.size() + wanted > limit) break;
    if (bytes == 0 || control) {
      clean += '?';
    } else {
      clean.append(text, at, bytes);
    }
    at += used;
  }
  return clean;
}

}  // namespace dpcomm
