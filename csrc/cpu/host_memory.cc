#include "cpu/host_memory.h"

#include <algorithm>
#include <cstdint>
#include <fstream>
#include <limits>
#include <optional>
#include <sstream>

#include "base/error.h"

namespace dpcomm {
namespace {

constexpr uint64_t kUnlimited = std::numeric_limits<uint64_t>::max();

std::optional<uint64_t> number_in(const std::string& path) {
  std::ifstream file(path);
  uint64_t number;
  if (file >> number) return number;  // "max" is no number
  return std::nullopt;
}

/// The sum of the numbers after the given words at the starts of lines.
uint64_t sum_of(const std::string& path, std::initializer_list<const char*> words) {
  std::ifstream file(path);
  uint64_t sum = 0;
  for (std::string line; std::getline(file, line);) {
    std::istringstream parts(line);
    std::string word;
    uint64_t number;
    if (parts >> word >> number && std::find(words.begin(), words.end(), word) != words.end()) {
      sum += number;
    }
  }
  return sum;
}

/// What the group in `folder` leaves; pages of files can be dropped.
uint64_t left_of_group(const std::string& folder, const char* limit_file, const char* usage_file,
                       std::initializer_list<const char*> of_files) {
  const std::optional<uint64_t> limit = number_in(folder + limit_file);
  const std::optional<uint64_t> usage = number_in(folder + usage_file);
  if (!limit || !usage) return kUnlimited;
  const uint64_t files = sum_of(folder + "/memory.stat", of_files);
  const uint64_t needed = *usage - std::min(*usage, files);
  return *limit - std::min(*limit, needed);
}

uint64_t left_of(const std::string& root, bool unified, std::string group) {
  uint64_t left = kUnlimited;
  for (;;) {  // the group, and all that it lies in
    if (unified) {
      left = std::min(left, left_of_group(root + "/sys/fs/cgroup" + group, "/memory.max",
                                          "/memory.current", {"inactive_file", "active_file"}));
    } else {
      left = std::min(left, left_of_group(root + "/sys/fs/cgroup/memory" + group,
                                          "/memory.limit_in_bytes", "/memory.usage_in_bytes",
                                          {"total_inactive_file", "total_active_file"}));
    }
    if (group.empty()) return left;
    group.resize(group.rfind('/') == std::string::npos ? 0 : group.rfind('/'));
  }
}

/// By the lines "<number>:<controllers>:<path>" of /proc/self/cgroup.
uint64_t left_of_groups(const std::string& root) {
  std::ifstream file(root + "/proc/self/cgroup");
  uint64_t left = kUnlimited;
  for (std::string line; std::getline(file, line);) {
    const size_t first = line.find(':');
    const size_t second = first == std::string::npos ? first : line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = str(",", line.substr(first + 1, second - first - 1), ",");
    const bool unified = controllers == ",,";
    if (!unified && controllers.find(",memory,") == std::string::npos) continue;
    std::string group = line.substr(second + 1);
    if (group == "/") group.clear();
    left = std::min(left, left_of(root, unified, group));
  }
  return left;
}

}  // namespace

size_t available_memory(const std::string& root) {
  const uint64_t kib = sum_of(root + "/proc/meminfo", {"MemAvailable:", "SwapFree:"});
  return std::min(kib == 0 ? kUnlimited : kib * 1024, left_of_groups(root));
}

}  // namespace dpcomm
