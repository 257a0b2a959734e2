// What this folder needs of Python without including it; csrc/bind sets the functions at import.
#pragma once

#include <exception>
#include <functional>

#include "base/error.h"

namespace dpcomm {

struct PythonHooks {
  /// The exception that Python shall see for one of the core: of the class of dpcomm.errors that
  /// fits, on every way through torch. Called without the GIL; the default changes nothing.
  std::exception_ptr (*translate)(std::exception_ptr error) = nullptr;
  /// True if a signal came that Python turns into an exception, such as Ctrl-C; translate() gives
  /// that exception for the next error of this thread. Called without the GIL.
  bool (*interrupted)() = nullptr;
  /// Runs `body`, without the GIL if this thread holds it: for what may wait for a thread that is
  /// about to call into Python.
  void (*without_gil)(const std::function<void()>& body) = nullptr;
};

/// The functions in use. Written once, before the first process group exists.
PythonHooks& python_hooks();

/// `error` as Python shall see it; null stays null.
std::exception_ptr translated(std::exception_ptr error);

/// Throws `error` as Python shall see it.
[[noreturn]] void throw_translated(const Error& error);

/// Runs `body` and throws the core's errors as Python shall see them.
template <class Body>
auto translating(Body&& body) {
  try {
    return body();
  } catch (const Error& error) {
    throw_translated(error);
  }
}

/// Runs `body` without the GIL, if this thread holds it.
void without_gil(const std::function<void()>& body);

}  // namespace dpcomm
