// A decorator that makes a transport behave badly, for tests.
#pragma once

#include <memory>
#include <string>

#include "transport/channel.h"

namespace dpcomm {

/// Wraps a transport. `spec` is a comma-separated list:
///
///   rank=R       only this rank is faulty (default: all)
///   seed=S       of the random numbers (default 1)
///   stall=P      try_acquire and try_peek answer "not yet" with probability P
///   delay_us=D   sleep up to D microseconds before a message is published
///   drop=K       the K-th message published (from 1) is lost
///   retag=K      the K-th message carries a wrong tag
///   shorten=K    the K-th message claims to be one byte shorter
///   kill=K       the process kills itself (SIGKILL) in place of publishing the K-th message
///   stop=K       the process stops itself (SIGSTOP) in place of publishing the K-th message
///
/// The collectives' messages and those between two ranks are counted apart. Throws UsageError for
/// anything else.
std::unique_ptr<Transport> make_faulty(std::unique_ptr<Transport> inner, const std::string& spec);

}  // namespace dpcomm
