// Waiting in native code as Python wants it: without the GIL, and with its signal handlers.
#pragma once

#include <cxxabi.h>
#include <pybind11/pybind11.h>
#include <unistd.h>

#include <exception>
#include <memory>

namespace dpcomm {

/// Releases the GIL while it lives. A daemon thread that wants it back when the interpreter has
/// gone is ended by Python with pthread_exit(), which may not unwind through C++ (Python 3.14 parks
/// such threads itself); so it is parked here until the process ends.
class GilRelease {
 public:
  GilRelease() : state_(PyEval_SaveThread()) {}
  GilRelease(const GilRelease&) = delete;
  GilRelease& operator=(const GilRelease&) = delete;
  ~GilRelease() {
    try {
      PyEval_RestoreThread(state_);
    } catch (const abi::__forced_unwind&) {
      for (;;) pause();
    }
  }

 private:
  PyThreadState* state_;
};

/// Runs the handlers of Python's signals while the main thread waits in native code. What a handler
/// raised, KeyboardInterrupt for one, is kept for rethrow().
class SignalWatch {
 public:
  /// True if a handler raised. Does nothing in other threads, where Python runs no handlers.
  bool operator()() {
    if (!is_main_thread_) return false;
    pybind11::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() == 0) return false;
    raised_ = std::make_unique<pybind11::error_already_set>();
    return true;
  }
  /// With the GIL: throws what a handler raised, if one did.
  void rethrow() {
    if (raised_) throw pybind11::error_already_set(*raised_);
  }

 private:
  static unsigned long main_thread() {
    static const auto ident = pybind11::module_::import("threading")
                                  .attr("main_thread")()
                                  .attr("ident")
                                  .cast<unsigned long>();
    return ident;
  }

  const bool is_main_thread_ = PyThread_get_thread_ident() == main_thread();
  std::unique_ptr<pybind11::error_already_set> raised_;
};

/// Calls body(interrupted) without the GIL; `interrupted` is for a wait to ask now and then.
template <class Body>
void with_signals(const Body& body) {
  SignalWatch watch;
  try {
    GilRelease release;
    body([&watch] { return watch(); });
  } catch (const std::exception&) {
    watch.rethrow();
    throw;
  }
  watch.rethrow();
}

}  // namespace dpcomm
