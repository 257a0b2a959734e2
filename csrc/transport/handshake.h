// What ranks tell each other through a store while they meet: every format with its parser. Whoever
// reaches the store may have written anything there, so each parser takes any bytes and gives a
// value that makes sense or an InternalError.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>

#include "base/error.h"

namespace dpcomm {

/// No value of a handshake is longer; longer ones are refused unread.
inline constexpr size_t kMaxHandshakeBytes = size_t{64} << 10;

/// "the store holds a damaged <what>: '...'", with the beginning of the value.
Error damaged(const char* what, const std::string& text);

/// "error <kind> <text>", or nothing if `text` does not begin with "error ".
std::string error_text(const Error& error);
std::optional<Error> parse_error(const std::string& text);

/// Where rank 0's segment is.
struct Offer {
  int64_t pid = 0;
  uint64_t pid_namespace = 0;
  uint64_t born = 0;
  int world = 0;
  int fd = -1;
  size_t slot_bytes = 0;
  uint64_t nonce = 0;
  std::string path;  ///< of a file with a name; else empty

  std::string text() const;
  static Offer parse(const std::string& text);
};

/// What the path of a segment with a name ends in: "/dpcomm-" and 16 hexadecimal digits. Nothing
/// else is opened or removed at a peer's word.
bool is_segment_path(const std::string& path);

/// A rank's answer to an offer: nothing for "ok", or, from "no <text>", why it cannot attach.
std::optional<std::string> parse_answer(const std::string& text);

/// Rank 0's verdict of a round: true for "go", false for "again". Errors are parse_error()'s.
bool parse_verdict(const std::string& text);

/// The name that the ranks of a group agreed upon: 16 hexadecimal digits, '-', and the group.
std::string parse_group_name(const std::string& text, const std::string& group);

}  // namespace dpcomm
