// A small harness for native tests. A file tests/native/<name>_test.cc becomes an executable:
//
//   #include "check.h"
//   TEST(ring_of_two) { CHECK_EQ(1 + 1, 2); }
//
// Usage: <name>_test [--long] [--seed N] [part of a test's name]. Every test has a deadline.
#pragma once

#include <cstdint>
#include <sstream>
#include <string>

namespace check {

using TestFunction = void (*)();

/// Adds a test to those that main() runs.
struct Registration {
  Registration(const char* name, TestFunction function);
};

/// Ends the process with status 1 and the text. Any thread may call.
[[noreturn]] void fail(const char* file, int line, const std::string& text);

/// Whether --long was given: more rounds, larger worlds.
bool long_run();

/// The seed of this run: --seed, else a fresh one, which is printed.
std::uint64_t seed();

template <class A, class B>
std::string describe(const char* text, const A& a, const B& b) {
  std::ostringstream out;
  out << text << ": " << a << " and " << b;
  return out.str();
}

}  // namespace check

#define TEST(name)                                                                 \
  static void check_test_##name();                                                 \
  static const ::check::Registration check_entry_##name(#name, check_test_##name); \
  static void check_test_##name()

#define CHECK(condition)                                             \
  do {                                                               \
    if (!(condition)) ::check::fail(__FILE__, __LINE__, #condition); \
  } while (false)

#define CHECK_EQ(a, b)                                                                      \
  do {                                                                                      \
    const auto& check_a = (a);                                                              \
    const auto& check_b = (b);                                                              \
    if (!(check_a == check_b))                                                              \
      ::check::fail(__FILE__, __LINE__, ::check::describe(#a " == " #b, check_a, check_b)); \
  } while (false)

#define CHECK_THROWS(exception, statement)                                                  \
  do {                                                                                      \
    bool check_thrown = false;                                                              \
    try {                                                                                   \
      statement;                                                                            \
    } catch (const exception&) {                                                            \
      check_thrown = true;                                                                  \
    }                                                                                       \
    if (!check_thrown) ::check::fail(__FILE__, __LINE__, "no " #exception ": " #statement); \
  } while (false)
