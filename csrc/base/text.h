// Text from outside, made fit for a message.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace dpcomm {

/// `text` with every byte that is neither printable, nor a newline, nor part of a valid UTF-8
/// character replaced by '?', cut to at most `limit` bytes and never inside a character.
std::string printable(std::string_view text, size_t limit);

}  // namespace dpcomm
