// A flight recorder in the form that torch's `torchfrtrace` reads: version 2.10 of the dumps that
// torch/csrc/distributed/c10d/FlightRecorder.hpp writes, pickled.
//
// Three things are as the reader wants them and not as they are:
// - It refuses names of backends that it does not know, so profiling_name says "gloo:". The field
//   dpcomm_name has the real name.
// - It takes operations of one group with one number for parts of a whole. Operations on a device
//   have numbers of their own, so they are those of a group "<name> on device".
// - It expects every rank of a group in every operation. So the messages from one rank to another
//   with one tag are a group of these two, with numbers of their own; then it pairs each send with
//   its receive and names the rank that lacks one.
#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstring>
#include <map>
#include <utility>

#include "base/clock.h"
#include "base/pickle_writer.h"
#include "comm/flight_recorder.h"
#include "schedule/registry.h"

namespace dpcomm {
namespace {

constexpr const char* kVersion = "2.10";
constexpr const char* kBackend = "gloo:";

const char* torch_dtype(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat32:
      return "Float";
    case Dtype::kFloat64:
      return "Double";
    case Dtype::kFloat16:
      return "Half";
    case Dtype::kBFloat16:
      return "BFloat16";
    case Dtype::kInt8:
      return "Char";
    case Dtype::kUint8:
      return "Byte";
    case Dtype::kInt16:
      return "Short";
    case Dtype::kInt32:
      return "Int";
    case Dtype::kInt64:
      return "Long";
    case Dtype::kBool:
      return "Bool";
  }
  return "Byte";
}

/// What the dump says of an entry's group.
struct DumpedGroup {
  std::string name;
  std::vector<int> global_ranks;
};

/// The ranks of a message in its group: from, to.
std::pair<int, int> way_of(const FlightEntry& entry, const FlightGroup& group) {
  return entry.kind == FlightKind::kSend ? std::pair(group.rank, int{entry.peer})
                                         : std::pair(int{entry.peer}, group.rank);
}

DumpedGroup dumped_group(const FlightEntry& entry, const FlightGroup& group) {
  if (entry.kind == FlightKind::kCollective) {
    return {group.name + (entry.on_device ? " on device" : ""), group.global_ranks};
  }
  const auto [from, to] = way_of(entry, group);
  const std::string tag = entry.tag == 0 ? std::string() : str(" tag ", entry.tag);
  return {str(group.name, " ", from, "->", to, tag),
          {group.global_ranks[from], group.global_ranks[to]}};
}

std::string profiling_name(const FlightEntry& entry, const FlightGroup& group) {
  if (entry.kind == FlightKind::kCollective) {
    const bool gathers = entry.collective == Collective::kAllGather ||
                         entry.collective == Collective::kReduceScatter;
    return str(kBackend, name(entry.collective), entry.uneven && gathers ? "_v" : "");
  }
  // By position in the group of two, which the reader sorts by global rank.
  const auto [from, to] = way_of(entry, group);
  const int first = group.global_ranks[from] < group.global_ranks[to] ? 0 : 1;
  return entry.kind == FlightKind::kSend ? str(kBackend, "send ", first, "->", 1 - first)
                                         : str(kBackend, "recv ", 1 - first, "<-", first);
}

/// Times of now_ns() as nanoseconds since 1970.
class WallClock {
 public:
  WallClock()
      : offset_(std::chrono::duration_cast<std::chrono::nanoseconds>(
                    std::chrono::system_clock::now().time_since_epoch())
                    .count() -
                now_ns()) {}
  int64_t operator()(int64_t ns) const { return ns + offset_; }

 private:
  const int64_t offset_;
};

class DumpWriter {
 public:
  explicit DumpWriter(const std::vector<FlightGroup>& groups) : groups_(groups) {}

  std::string write(const std::vector<FlightEntry>& entries, const std::string& host) {
    out_.open_dict();
    text("version", kVersion);
    text("comm_lib_version", "dpcomm");
    text("host", host);
    out_.text("entries");
    out_.open_list();
    for (const FlightEntry& entry : entries) {
      // A receive from anybody that has not met a sender belongs to no pair.
      if (entry.kind == FlightKind::kCollective || entry.peer >= 0) write_entry(entry);
    }
    out_.close_list();
    out_.text("pg_config");
    out_.open_dict();
    for (const auto& [name, group] : dumped_) write_group(name, group.global_ranks);
    out_.close_dict();
    out_.text("pg_status");
    out_.open_dict();
    out_.close_dict();
    out_.close_dict();
    return out_.finish();
  }

 private:
  void text(const char* key, std::string_view value) {
    out_.text(key);
    out_.text(value);
  }
  void number(const char* key, int64_t value) {
    out_.text(key);
    out_.number(value);
  }
  void flag(const char* key, bool value) {
    out_.text(key);
    out_.boolean(value);
  }
  /// Nanoseconds since 1970, or None.
  void time(const char* key, int64_t ns) {
    out_.text(key);
    ns == 0 ? out_.none() : out_.number(wall_(ns));
  }
  void sizes(const char* key, uint64_t elems) {
    out_.text(key);
    out_.open_list();
    out_.open_list();
    out_.number(static_cast<int64_t>(elems));
    out_.close_list();
    out_.close_list();
  }
  void dtypes(const char* key, Dtype dtype) {
    out_.text(key);
    out_.open_list();
    out_.text(torch_dtype(dtype));
    out_.close_list();
  }

  void write_group(const std::string& name, const std::vector<int>& ranks) {
    out_.text(name);
    out_.open_dict();
    text("name", name);
    text("desc", "undefined");
    std::string list;
    for (const int rank : ranks) list += str(list.empty() ? "" : ", ", rank);
    text("ranks", "[" + list + "]");
    out_.close_dict();
  }

  void write_entry(const FlightEntry& entry) {
    const FlightGroup& group = groups_[entry.group];
    const DumpedGroup dumped = dumped_group(entry, group);
    const bool message = entry.kind != FlightKind::kCollective;
    // A sender's input meets the receiver's output.
    const bool total = entry.uneven && entry.collective != Collective::kAllToAll;
    out_.open_dict();
    number("record_id", static_cast<int64_t>(entry.id) - 1);
    number("pg_id", entry.group);
    out_.text("process_group");
    out_.text(dumped.name);
    out_.text("undefined");
    out_.pair();
    number("collective_seq_id", static_cast<int64_t>(entry.sequence));
    number("p2p_seq_id", message ? static_cast<int64_t>(entry.sequence) : 0);
    number("op_id", static_cast<int64_t>(entry.id));
    flag("is_p2p", message);
    text("profiling_name", profiling_name(entry, group));
    sizes("input_sizes", total ? entry.total_elems : entry.input_elems);
    dtypes("input_dtypes", entry.dtype);
    sizes("output_sizes", total ? entry.total_elems : entry.output_elems);
    dtypes("output_dtypes", entry.dtype);
    text("state", name(entry.state));
    flag("retired", entry.state == FlightState::kCompleted);
    number("timeout_ms", entry.timeout_ms);
    time("time_created_ns", entry.created_ns);
    time("time_discovered_started_ns", entry.started_ns);
    time("time_discovered_completed_ns", entry.completed_ns);
    if (entry.started_ns != 0 && entry.completed_ns != 0) {
      out_.text("duration_ms");
      out_.real(static_cast<double>(entry.completed_ns - entry.started_ns) / 1e6);
    }
    out_.text("frames");
    out_.open_list();
    out_.close_list();
    write_own_fields(entry);
    out_.close_dict();
    dumped_.emplace(dumped.name, dumped);
  }

  /// What torch's form does not have.
  void write_own_fields(const FlightEntry& entry) {
    text("dpcomm_name", str("dpcomm:", name(entry)));
    if (entry.kind == FlightKind::kCollective) {
      text("algorithm", kAlgorithms[entry.algorithm].name);
      text("wire", name(entry.wire));
      if (reduces(entry.collective)) text("op", name(entry.op));
    }
    if (!entry.error.empty()) text("error", entry.error);
  }

  const std::vector<FlightGroup>& groups_;
  const WallClock wall_;
  PickleWriter out_;
  std::map<std::string, DumpedGroup> dumped_;
};

void write_file(const std::string& path, const std::string& bytes) {
  const std::string temporary = str(path, ".", getpid());
  const int fd = ::open(temporary.c_str(), O_CREAT | O_TRUNC | O_WRONLY | O_CLOEXEC, 0644);
  const auto refuse = [&] {
    const int error = errno;
    if (fd >= 0) ::unlink(temporary.c_str());
    throw usage_error("cannot write the flight record ", path, ": ", strerror(error));
  };
  if (fd < 0) refuse();
  size_t done = 0;
  while (done < bytes.size()) {
    const ssize_t n = ::write(fd, bytes.data() + done, bytes.size() - done);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) {
      const int error = errno;
      ::close(fd);
      errno = error;
      refuse();
    }
    done += static_cast<size_t>(n);
  }
  ::close(fd);
  if (::rename(temporary.c_str(), path.c_str()) != 0) refuse();
}

}  // namespace

std::string FlightRecorder::dump(const std::string& prefix) const {
  char host[256] = "";
  gethostname(host, sizeof(host) - 1);
  // In this order: a group is there before its entries.
  const std::vector<FlightEntry> kept = entries();
  const std::vector<FlightGroup> known = groups();
  std::string path = str(prefix, global_rank_);
  write_file(path, DumpWriter(known).write(kept, host));
  return path;
}

}  // namespace dpcomm
