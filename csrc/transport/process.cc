#include "transport/process.h"

#include <signal.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <fstream>
#include <sstream>

#include "base/error.h"
#include "base/text.h"
#include "transport/handshake.h"

namespace dpcomm {
namespace {

constexpr size_t kHostBytes = 63;

/// Names the PID namespace of this process; 0 if that cannot be known.
uint64_t own_pid_namespace() {
  struct stat status;
  return stat("/proc/self/ns/pid", &status) == 0 ? status.st_ino : 0;
}

struct ProcessStat {
  bool there = false;
  char state = '?';
  uint64_t born = 0;
};

ProcessStat read_stat(int64_t pid) {
  ProcessStat found;
  std::ifstream file(str("/proc/", pid, "/stat"));
  std::string line;
  if (!std::getline(file, line)) return found;
  const size_t name_end = line.rfind(')');  // the name may hold anything
  if (name_end == std::string::npos) return found;
  std::istringstream rest(line.substr(name_end + 1));
  found.there = static_cast<bool>(rest >> found.state);
  std::string skipped;
  for (int field = 4; field < 22; ++field) rest >> skipped;
  rest >> found.born;
  return found;
}

}  // namespace

std::string own_host() {
  char name[256] = {};
  if (gethostname(name, sizeof(name) - 1) != 0 || name[0] == '\0') return "unknown";
  std::string host = printable(name, kHostBytes);
  for (char& letter : host) {
    if (letter == ' ' || letter == '\n') letter = '?';
  }
  return host;
}

Presence Presence::own() {
  return Presence{getpid(), own_pid_namespace(), read_stat(getpid()).born, own_host()};
}

std::string Presence::text() const {
  return str("process ", pid, ' ', pid_namespace, ' ', born, ' ', host);
}

Presence Presence::parse(const std::string& text) {
  Presence found;
  std::string word, more;
  std::istringstream in(text);
  if (text.size() > kMaxHandshakeBytes || !(in >> word) || word != "process" ||
      !(in >> found.pid >> found.pid_namespace >> found.born >> found.host) || in >> more ||
      found.pid <= 0 || found.pid > INT32_MAX || found.host.size() > kHostBytes) {
    throw damaged("name of a process", text);
  }
  found.host = printable(found.host, kHostBytes);
  return found;
}

bool Presence::gone() const {
  if (pid <= 0 || pid_namespace == 0 || pid_namespace != own_pid_namespace()) return false;
  const ProcessStat now = read_stat(pid);
  if (!now.there) return kill(static_cast<pid_t>(pid), 0) != 0 && errno == ESRCH;
  if (born != 0 && now.born != 0 && now.born != born) return true;
  return now.state == 'Z' || now.state == 'X';
}

std::string describe_rank(int rank, int64_t pid, const std::string& host) {
  return str("rank ", rank, " (pid ", pid, ", host ", host, ")");
}

}  // namespace dpcomm
