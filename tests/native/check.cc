#include "check.h"

#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <random>
#include <vector>

namespace check {
namespace {

constexpr unsigned kDeadlineSeconds = 60;
constexpr unsigned kLongDeadlineSeconds = 900;

struct Test {
  const char* name;
  TestFunction function;
};

std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}

bool g_long_run = false;
std::uint64_t g_seed = 0;

}  // namespace

Registration::Registration(const char* name, TestFunction function) {
  tests().push_back({name, function});
}

void fail(const char* file, int line, const std::string& text) {
  std::fprintf(stderr, "%s:%d: %s (seed %llu)\n", file, line, text.c_str(),
               static_cast<unsigned long long>(g_seed));
  std::fflush(nullptr);
  std::_Exit(1);
}

bool long_run() { return g_long_run; }

std::uint64_t seed() { return g_seed; }

namespace {

int run(const char* filter) {
  int count = 0;
  for (const Test& test : tests()) {
    if (std::strstr(test.name, filter) == nullptr) continue;
    std::printf("%s ... ", test.name);
    std::fflush(stdout);
    alarm(g_long_run ? kLongDeadlineSeconds : kDeadlineSeconds);  // SIGALRM ends a test that hangs
    const auto start = std::chrono::steady_clock::now();
    test.function();
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
    std::printf("ok, %.1f s\n", took.count());
    ++count;
  }
  alarm(0);
  std::printf("%d passed, seed %llu\n", count, static_cast<unsigned long long>(g_seed));
  return count > 0 ? 0 : 5;
}

}  // namespace
}  // namespace check

int main(int argc, char** argv) {
  const char* filter = "";
  check::g_seed = std::random_device{}();
  for (int i = 1; i < argc; ++i) {
    if (std::strcmp(argv[i], "--long") == 0) {
      check::g_long_run = true;
    } else if (std::strcmp(argv[i], "--seed") == 0 && i + 1 < argc) {
      check::g_seed = std::strtoull(argv[++i], nullptr, 10);
    } else {
      filter = argv[i];
    }
  }
  try {
    return check::run(filter);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "exception: %s (seed %llu)\n", error.what(),
                 static_cast<unsigned long long>(check::g_seed));
    return 1;
  }
}
