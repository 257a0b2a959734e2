#include "transport/process_memory.h"

#include <sys/prctl.h>
#include <sys/uio.h>
#include <unistd.h>

#include <cerrno>
#include <fstream>

#include "base/env.h"
#include "base/error.h"

namespace dpcomm {

void allow_reading() {
  std::ifstream scope("/proc/sys/kernel/yama/ptrace_scope");
  int value = 0;
  if (!(scope >> value) || value != 1 || !reading_wanted()) return;
  prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY, 0, 0, 0);  // where it fails, the probe will
}

bool reading_wanted() {
  const std::string value = environment(Variable::SINGLE_COPY);
  if (value == "auto") return true;
  if (value == "off") return false;
  throw usage_error("DPCOMM_SINGLE_COPY=", value, " is neither auto nor off");
}

size_t single_copy_wanted() {
  const double bytes = environment_number(Variable::SINGLE_COPY_BYTES, -1);
  return bytes < 0 ? SIZE_MAX : static_cast<size_t>(bytes);
}

bool read_memory(uint32_t pid, uint64_t address, void* to, size_t bytes) {
  auto* own = static_cast<std::byte*>(to);
  while (bytes > 0) {
    iovec local{own, bytes};
    iovec remote{reinterpret_cast<void*>(address), bytes};
    const ssize_t got = process_vm_readv(static_cast<pid_t>(pid), &local, 1, &remote, 1, 0);
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) return false;
    own += got;
    address += static_cast<uint64_t>(got);
    bytes -= static_cast<size_t>(got);
  }
  return true;
}

bool can_read_own() {
  const uint64_t word = 1;
  uint64_t copy = 0;
  return read_memory(static_cast<uint32_t>(getpid()), reinterpret_cast<uint64_t>(&word), &copy,
                     sizeof(copy)) &&
         copy == word;
}

}  // namespace dpcomm
