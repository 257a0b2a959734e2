#include "torch/store_bootstrap.h"

#include <cstdio>
#include <random>
#include <utility>
#include <vector>

#include "base/error.h"

namespace dpcomm {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

constexpr char kRefused = '!';  // begins an answer that is no name but an error

milliseconds left(Clock::time_point deadline) {
  const auto rest = std::chrono::duration_cast<milliseconds>(deadline - Clock::now());
  return std::max(rest, milliseconds(0));
}

/// For what a store throws besides a time limit that ran out.
Error store_failed(const std::exception& error) {
  const auto* from_torch = dynamic_cast<const c10::Error*>(&error);
  return peer_error("the store that the ranks meet in failed: ",
                    from_torch ? from_torch->what_without_backtrace() : error.what());
}

/// Waits for a key; false if `timeout` runs out. Stores throw for that, each its own class.
bool wait_for(c10d::Store& store, const std::string& key, milliseconds timeout) {
  if (timeout <= milliseconds(0)) return store.check({key});
  const auto deadline = Clock::now() + timeout;
  try {
    store.wait({key}, timeout);
    return true;
  } catch (const std::exception& error) {
    // A little early is not early: stores round.
    if (Clock::now() + std::min(timeout / 4, milliseconds(50)) >= deadline) return false;
    throw store_failed(error);
  }
}

/// The numbers of one rank's attempts in the store.
class Attempts {
 public:
  Attempts(c10d::Store& store, int rank)
      : store_(store),
        made_("dpcomm/made/" + std::to_string(rank)),
        answered_("dpcomm/answered/" + std::to_string(rank)),
        key_("dpcomm/attempt/" + std::to_string(rank) + "/") {}

  int64_t make() {
    const int64_t attempt = store_.add(made_, 1);
    store_.set(ask_key(attempt), std::string("1"));
    return attempt;
  }
  /// The newest attempt that waits for an answer, or 0.
  int64_t pending() {
    const int64_t answered = store_.add(answered_, 0);
    const int64_t made = store_.add(made_, 0);
    return made > answered ? made : 0;
  }
  /// Waits for the next attempt, at most `timeout`. It may have given up since.
  void wait(milliseconds timeout) {
    wait_for(store_, ask_key(store_.add(answered_, 0) + 1), timeout);
  }
  void mark_answered(int64_t attempt) { store_.add(answered_, attempt - store_.add(answered_, 0)); }
  std::string answer_key(int64_t attempt) const {
    return key_ + std::to_string(attempt) + "/answer";
  }

 private:
  std::string ask_key(int64_t attempt) const { return key_ + std::to_string(attempt) + "/ask"; }

  c10d::Store& store_;
  std::string made_, answered_, key_;
};

std::string unique_name(const std::string& group) {
  std::random_device source;
  char digits[17];
  std::snprintf(digits, sizeof(digits), "%08x%08x", source(), source());
  return std::string(digits) + "-" + group;
}

Error absent(c10d::Store& store, int rank, int world, const std::string& group,
             milliseconds timeout) {
  std::string ranks;
  for (int other = 0; other < world; ++other) {
    if (other == rank || Attempts(store, other).pending() != 0) continue;
    ranks += (ranks.empty() ? "" : ", ") + std::to_string(other);
  }
  return timeout_error("group '", group, "', rank ", rank, " of ", world, ": rank(s) ",
                       ranks.empty() ? "that came meanwhile" : ranks, " did not come within ",
                       timeout.count(), " ms");
}

/// Answers the newest attempt of every rank that waits for one.
void answer_all(c10d::Store& store, int world, const std::string& answer) {
  for (int rank = 1; rank < world; ++rank) {
    Attempts other(store, rank);
    const int64_t attempt = other.pending();
    if (attempt == 0) continue;
    other.mark_answered(attempt);
    store.set(other.answer_key(attempt), answer);
  }
}

std::string lead(c10d::Store& store, int world, const std::string& group, milliseconds timeout) {
  const auto deadline = Clock::now() + timeout;
  for (int rank = 1; rank < world; ++rank) {
    Attempts other(store, rank);
    while (other.pending() == 0) {
      if (left(deadline) == milliseconds(0)) {
        const Error error = absent(store, 0, world, group, timeout);
        answer_all(store, world, kRefused + std::string(error.what()));
        throw error;
      }
      other.wait(left(deadline));
    }
  }
  const std::string name = unique_name(group);
  answer_all(store, world, name);
  return name;
}

/// A refusal may have been meant for an attempt before this one, so the rank asks again until its
/// own time is up.
std::string follow(c10d::Store& store, int rank, int world, const std::string& group,
                   milliseconds timeout, int64_t& attempt) {
  const auto deadline = Clock::now() + timeout;
  Attempts own(store, rank);
  std::string refusal;
  for (;;) {
    const std::string key = own.answer_key(attempt);
    if (!wait_for(store, key, left(deadline))) {
      if (refusal.empty()) throw absent(store, rank, world, group, timeout);
      throw timeout_error(refusal);
    }
    const std::string answer = store.get_to_str(key);
    if (answer[0] != kRefused) return answer;
    refusal = answer.substr(1);
    attempt = own.make();
  }
}

}  // namespace

StoreBootstrap::StoreBootstrap(c10::intrusive_ptr<c10d::Store> store, std::string prefix)
    : store_(std::move(store)), prefix_(std::move(prefix)) {}

void StoreBootstrap::set(const std::string& key, const std::string& value) {
  store_->set(prefix_ + key, value);
}

bool StoreBootstrap::get(const std::string& key, milliseconds timeout, std::string& value) {
  if (!wait_for(*store_, prefix_ + key, timeout)) return false;
  value = store_->get_to_str(prefix_ + key);
  return true;
}

std::string agree_on_name(c10d::Store& store, int rank, int world, const std::string& group,
                          milliseconds timeout) {
  if (world == 1) return unique_name(group);
  Attempts own(store, rank);
  int64_t attempt = own.make();
  try {
    const std::string name = rank == 0 ? lead(store, world, group, timeout)
                                       : follow(store, rank, world, group, timeout, attempt);
    if (rank == 0) own.mark_answered(attempt);
    return name;
  } catch (const Error&) {
    try {
      own.mark_answered(attempt);
    } catch (const std::exception&) {  // the store is gone: nobody will ask it
    }
    throw;
  } catch (const std::exception& error) {
    throw store_failed(error);
  }
}

}  // namespace dpcomm
