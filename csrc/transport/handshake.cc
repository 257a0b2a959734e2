#include "transport/handshake.h"

#include <climits>
#include <sstream>

#include "base/text.h"

namespace dpcomm {
namespace {

constexpr size_t kShown = 80;            // bytes of a damaged value in a message
constexpr size_t kMaxTextBytes = 16384;  // of an error or an answer
constexpr size_t kSlotUnit = 64;
constexpr size_t kLargestSlot = size_t{1} << 31;
constexpr size_t kDigits = 16;
constexpr char kPrefix[] = "/dpcomm-";

bool are_digits(const std::string& text, size_t first) {
  if (text.size() < first + kDigits) return false;
  for (size_t i = first; i < first + kDigits; ++i) {
    const char letter = text[i];
    if (!(letter >= '0' && letter <= '9') && !(letter >= 'a' && letter <= 'f')) return false;
  }
  return true;
}

}  // namespace

Error damaged(const char* what, const std::string& text) {
  return internal_error("the store holds a damaged ", what, " (", text.size(), " bytes): '",
                        printable(text, kShown), text.size() > kShown ? "..." : "", "'");
}

std::string error_text(const Error& error) {
  return str("error ", static_cast<int>(error.kind()), ' ', error.what());
}

std::optional<Error> parse_error(const std::string& text) {
  constexpr char kWord[] = "error ";
  constexpr size_t kBegin = sizeof(kWord) - 1;
  if (text.compare(0, kBegin, kWord) != 0) return std::nullopt;
  const int kind = text.size() > kBegin ? text[kBegin] - '0' : -1;
  if (text.size() > kMaxHandshakeBytes || text.size() < kBegin + 2 || text[kBegin + 1] != ' ' ||
      kind < 0 || kind > static_cast<int>(ErrorKind::kInternal)) {
    throw damaged("error", text);
  }
  return Error(static_cast<ErrorKind>(kind), printable(text.substr(kBegin + 2), kMaxTextBytes));
}

std::string Offer::text() const {
  return str("segment ", pid, ' ', pid_namespace, ' ', born, ' ', world, ' ', fd, ' ', slot_bytes,
             ' ', nonce, ' ', path);
}

Offer Offer::parse(const std::string& text) {
  Offer offer;
  std::istringstream in(text);
  std::string word;
  bool good = text.size() <= kMaxHandshakeBytes && text.find('\0') == std::string::npos &&
              text.find('-') >= text.find('/');  // istream takes "-1" for a number without a sign
  good = good && (in >> word) && word == "segment" &&
         (in >> offer.pid >> offer.pid_namespace >> offer.born >> offer.world >> offer.fd >>
          offer.slot_bytes >> offer.nonce);
  if (good) std::getline(in >> std::ws, offer.path);
  good = good && offer.pid > 0 && offer.pid <= INT_MAX && offer.world > 0 && offer.fd >= 0 &&
         offer.slot_bytes >= kSlotUnit && offer.slot_bytes <= kLargestSlot &&
         offer.slot_bytes % kSlotUnit == 0 && (offer.path.empty() || is_segment_path(offer.path));
  if (!good) throw damaged("offer of a segment", text);
  return offer;
}

bool is_segment_path(const std::string& path) {
  constexpr size_t kPrefixBytes = sizeof(kPrefix) - 1;
  constexpr size_t kNameBytes = kPrefixBytes + kDigits;
  if (path.size() < kNameBytes || path.size() >= PATH_MAX) return false;
  const size_t name = path.size() - kNameBytes;
  return path.compare(name, kPrefixBytes, kPrefix) == 0 && are_digits(path, name + kPrefixBytes);
}

std::optional<std::string> parse_answer(const std::string& text) {
  constexpr char kWord[] = "no ";
  constexpr size_t kBegin = sizeof(kWord) - 1;
  if (text == "ok") return std::nullopt;
  if (text.size() > kMaxHandshakeBytes || text.compare(0, kBegin, kWord) != 0) {
    throw damaged("answer to an offer", text);
  }
  return printable(text.substr(kBegin), kMaxTextBytes);
}

bool parse_verdict(const std::string& text) {
  if (text != "go" && text != "again") throw damaged("verdict", text);
  return text == "go";
}

std::string parse_group_name(const std::string& text, const std::string& group) {
  if (!are_digits(text, 0) || text.size() != kDigits + 1 + group.size() || text[kDigits] != '-' ||
      text.compare(kDigits + 1, group.size(), group) != 0) {
    throw damaged("name of a group", text);
  }
  return text;
}

}  // namespace dpcomm
