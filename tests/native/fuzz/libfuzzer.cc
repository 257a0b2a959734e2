// The targets under libFuzzer, where clang is there;
// tests/native/fuzz/run_libfuzzer.sh builds and runs it. The first byte chooses the target.
#include <cstdio>
#include <cstdlib>

#include "fuzz/targets.h"

namespace check {
void fail(const char* file, int line, const std::string& text) {
  std::fprintf(stderr, "%s:%d: %s\n", file, line, text.c_str());
  std::abort();
}
}  // namespace check

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  const auto& targets = dpcomm::fuzz::targets();
  const std::string bytes(reinterpret_cast<const char*>(data) + 1, size - 1);
  targets[data[0] % targets.size()].run(bytes);
  return 0;
}
