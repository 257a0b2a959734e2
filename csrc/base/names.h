// From the names of enumerations back to their values.
#pragma once

#include <string>

#include "base/error.h"

namespace dpcomm {

/// The value among the first `count` of an enumeration whose name(value) is `text`. Throws a
/// UsageError "<what> '<text>' is not known; there are ..." if there is none.
template <class Enumeration>
Enumeration by_name(const std::string& text, int count, const char* what) {
  std::string known;
  for (int i = 0; i < count; ++i) {
    const auto value = static_cast<Enumeration>(i);
    if (text == name(value)) return value;
    known += str(known.empty() ? "" : ", ", name(value));
  }
  throw usage_error(what, " '", text, "' is not known; there are ", known);
}

}  // namespace dpcomm
