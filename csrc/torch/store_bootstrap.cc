#include "torch/store_bootstrap.h"

#include <algorithm>
#include <charconv>
#include <cstdio>
#include <limits>
#include <optional>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#include "base/error.h"
#include "base/log.h"
#include "transport/handshake.h"
#include "transport/rendezvous.h"

namespace dpcomm {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

constexpr milliseconds kLook{100};   // how long a look at the store may take
constexpr milliseconds kGrace{400};  // for news of a decision that is due

milliseconds left(Clock::time_point deadline) {
  const auto rest = std::chrono::duration_cast<milliseconds>(deadline - Clock::now());
  return std::max(rest, milliseconds(0));
}

/// For what a store throws besides a time limit that ran out. Its text is not the same on all
/// ranks, so that it goes to the log.
Error store_failed(const std::exception& error) {
  const auto* from_torch = dynamic_cast<const c10::Error*>(&error);
  log_line(LogLevel::kWarn,
           str("the store failed: ",
               from_torch != nullptr ? from_torch->what_without_backtrace() : error.what()));
  return peer_error("the store that the ranks meet in failed; is the process gone that keeps it?");
}

/// Waits for a key; false if `timeout` runs out. Asks again and again: a TCPStore writes a warning
/// for every wait that is in vain.
bool wait_for(c10d::Store& store, const std::string& key, milliseconds timeout) {
  constexpr std::chrono::microseconds kFirst{500}, kLongest{20000};
  const auto deadline = Clock::now() + timeout;
  try {
    for (auto pause = kFirst; !store.check({key}); pause = std::min(pause * 2, kLongest)) {
      if (Clock::now() >= deadline) return false;
      std::this_thread::sleep_for(pause);
    }
    return true;
  } catch (const std::exception& error) {
    throw store_failed(error);
  }
}

/// A count that ranks add to. Throws InternalError where something else is in the store.
int64_t count_of(c10d::Store& store, const std::string& key, int64_t more = 0) {
  constexpr int64_t kMost = int64_t{1} << 48;
  const int64_t count = store.add(key, more);
  if (count < 0 || count > kMost) throw damaged("count of attempts", std::to_string(count));
  return count;
}

/// A number that another rank has written. Throws InternalError where something else is there.
int64_t count_in(const std::string& text) {
  int64_t count = -1;
  const char* end = text.data() + text.size();
  const auto [parsed, error] = std::from_chars(text.data(), end, count);
  if (error != std::errc() || parsed != end || count < 1) throw damaged("number of ranks", text);
  return count;
}

/// The numbers of one rank's attempts in the store.
class Attempts {
 public:
  Attempts(c10d::Store& store, int rank)
      : store_(store),
        made_("dpcomm/made/" + std::to_string(rank)),
        answered_("dpcomm/answered/" + std::to_string(rank)),
        process_("dpcomm/process/" + std::to_string(rank)),
        world_("dpcomm/world/" + std::to_string(rank)),
        key_("dpcomm/attempt/" + std::to_string(rank) + "/") {}

  /// Of a rank that means a group of `world` ranks.
  int64_t make(int world) {
    store_.set(process_, Presence::own().text());  // before anybody can see the attempt
    store_.set(world_, std::to_string(world));
    const int64_t attempt = count_of(store_, made_, 1);
    store_.set(ask_key(attempt), std::string("1"));
    return attempt;
  }
  /// The newest attempt that waits for an answer, or 0.
  int64_t pending() {
    const int64_t answered = count_of(store_, answered_);
    const int64_t made = count_of(store_, made_);
    return made > answered ? made : 0;
  }
  /// Waits for the next attempt, at most `timeout`. It may have given up since.
  void wait(milliseconds timeout) {
    wait_for(store_, ask_key(count_of(store_, answered_) + 1), timeout);
  }
  void mark_answered(int64_t attempt) {
    store_.add(answered_, attempt - count_of(store_, answered_));
  }
  /// Whose newest attempt it is; nothing of a rank that has made none.
  std::optional<Presence> presence() {
    if (!store_.check({process_})) return std::nullopt;
    return Presence::parse(store_.get_to_str(process_));
  }
  /// What it was made with; 0 if it has made none.
  int64_t world() { return store_.check({world_}) ? count_in(store_.get_to_str(world_)) : 0; }
  std::string answer_key(int64_t attempt) const {
    return key_ + std::to_string(attempt) + "/answer";
  }

 private:
  std::string ask_key(int64_t attempt) const { return key_ + std::to_string(attempt) + "/ask"; }

  c10d::Store& store_;
  std::string made_, answered_, process_, world_, key_;
};

std::string unique_name(const std::string& group) {
  std::random_device source;
  char digits[17];
  std::snprintf(digits, sizeof(digits), "%08x%08x", source(), source());
  return std::string(digits) + "-" + group;
}

/// A group's ranks that are about to agree, as one of them sees them.
class Agreement {
 public:
  Agreement(c10d::Store& store, int rank, int world, const std::string& group, milliseconds timeout)
      : store_(store),
        rank_(rank),
        world_(world),
        group_(group),
        timeout_(timeout),
        deadline_(Clock::now() + timeout),
        seen_(world) {}

  std::string lead(int64_t attempt);
  std::string follow(int64_t& attempt);
  /// The error, or, where it comes from rank 0 and its store being gone, the one that says so.
  Error explained(const Error& error) const;

 private:
  /// The attempt of a rank that waits, whose process is not known to be gone; else 0. Throws
  /// PeerError if it is gone and was seen alive in this start.
  int64_t alive(int rank);
  /// Notes it if a rank that waits means a group of another size.
  void compare_worlds(int rank);
  /// Whether they disagree and all that may come are there, for the sake of one text, or late.
  bool disagree(int missing) const;
  int lowest_follower();
  Error absent();
  void answer_all(const std::string& answer);
  [[noreturn]] void refuse(const Error& error);

  c10d::Store& store_;
  const int rank_, world_;
  const std::string& group_;
  const milliseconds timeout_;
  const Clock::time_point deadline_;
  std::vector<std::optional<Presence>> seen_;  // alive in this start
  std::optional<Error> odd_;                   // the first disagreement on the number of ranks
  Clock::time_point odd_since_;
  int64_t least_ = std::numeric_limits<int64_t>::max();  // number of ranks that another one means
};

int64_t Agreement::alive(int rank) {
  Attempts other(store_, rank);
  const int64_t attempt = other.pending();
  const auto presence = attempt == 0 ? std::nullopt : other.presence();
  if (!presence) return attempt;
  if (!presence->gone()) {
    seen_[rank] = presence;
    return attempt;
  }
  if (seen_[rank] && seen_[rank]->text() == presence->text()) {
    throw died_at_start(group_, world_, describe_rank(rank, presence->pid, presence->host));
  }
  other.mark_answered(attempt);  // of an earlier start
  return 0;
}

void Agreement::compare_worlds(int rank) {
  Attempts other(store_, rank);
  const int64_t world = other.world();
  if (world == 0 || world == world_) return;
  least_ = std::min(least_, world);
  if (odd_) return;
  odd_since_ = Clock::now();
  const Presence own = Presence::own();
  const auto presence = other.presence();
  const std::string name =
      presence ? describe_rank(rank, presence->pid, presence->host) : str("rank ", rank);
  odd_ = usage_error("ranks disagree: ", describe_rank(rank_, own.pid, own.host), " makes group '",
                     group_, "' of ", world_, " ranks, but ", name, " one of ", world);
}

bool Agreement::disagree(int missing) const {
  return odd_ &&
         (missing >= std::min<int64_t>(least_, world_) || Clock::now() - odd_since_ > kGrace);
}

Error Agreement::absent() {
  std::vector<Attendant> ranks(world_);
  for (int rank = 0; rank < world_; ++rank) {
    Attempts other(store_, rank);
    ranks[rank].rank = rank;
    const int64_t attempt = other.pending();
    auto presence = other.presence();
    if (rank == rank_) presence = Presence::own();
    if (attempt == 0 && rank != rank_) continue;
    ranks[rank].name =
        presence ? describe_rank(rank, presence->pid, presence->host) : str("rank ", rank);
    // Rank 0 would have answered.
    const bool stuck = rank == 0 && rank_ != 0;
    ranks[rank].attendance = stuck ? Attendance::kStuck : Attendance::kThere;
  }
  return absent_ranks(group_, ranks, timeout_);
}

/// Answers the newest attempt of every other rank that waits for one. Rank 0, which decides, only
/// looks at it when its time is up, and so counts as waiting on.
void Agreement::answer_all(const std::string& answer) {
  for (int rank = 0; rank < world_; ++rank) {
    if (rank == rank_) continue;
    Attempts other(store_, rank);
    const int64_t attempt = other.pending();
    if (attempt == 0) continue;
    if (rank != 0) other.mark_answered(attempt);
    store_.set(other.answer_key(attempt), answer);
  }
}

void Agreement::refuse(const Error& error) {
  answer_all(error_text(error));
  throw error;
}

/// A follower whose time is up before rank 0's says why, so that there is one text.
std::string Agreement::lead(int64_t attempt) {
  const std::string told = Attempts(store_, rank_).answer_key(attempt);
  try {
    for (int missing = 0; missing != world_;) {
      for (int rank = missing = 1; rank < world_; ++rank) {  // all: one may have died meanwhile
        if (alive(rank) == 0) continue;
        compare_worlds(rank);
        if (missing == rank) ++missing;
      }
      if (disagree(missing)) throw *odd_;
      if (missing == world_) break;
      if (left(deadline_) == milliseconds(0)) {
        const auto error =
            store_.check({told}) ? parse_error(store_.get_to_str(told)) : std::nullopt;
        throw error ? *error : absent();
      }
      Attempts(store_, missing).wait(std::min(left(deadline_), kLook));
    }
  } catch (const Error& error) {
    refuse(error);
  }
  const std::string name = unique_name(group_);
  StoreBootstrap bootstrap(c10::intrusive_ptr<c10d::Store>::reclaim_copy(&store_),
                           store_prefix(name));
  for (int rank = 1; rank < world_; ++rank) {  // so that nobody can die in between unnoticed
    if (seen_[rank]) bootstrap.set(here_key(name, rank), seen_[rank]->text());
  }
  answer_all(name);
  return name;
}

Error Agreement::explained(const Error& error) const {
  if (error.kind() != ErrorKind::kPeer || rank_ == 0 || !seen_[0]) return error;
  const auto patience = Clock::now() + kGrace;
  while (!seen_[0]->gone()) {
    if (Clock::now() > patience) return error;
    std::this_thread::sleep_for(milliseconds(5));
  }
  return died_at_start(group_, world_, describe_rank(0, seen_[0]->pid, seen_[0]->host));
}

/// The lowest rank but 0 that waits.
int Agreement::lowest_follower() {
  int rank = 1;
  while (rank < rank_ && Attempts(store_, rank).pending() == 0) ++rank;
  return rank;
}

/// A refusal may have been meant for an attempt before this one, so the rank asks again until its
/// own time is up; but not after a death.
std::string Agreement::follow(int64_t& attempt) {
  Attempts own(store_, rank_);
  std::optional<Error> refusal;
  auto deadline = deadline_ + kGrace / 2;  // rank 0, which may have come later, decides first
  bool late = false;
  for (;;) {
    const std::string key = own.answer_key(attempt);
    if (wait_for(store_, key, std::min(left(deadline), kLook))) {
      const std::string answer = store_.get_to_str(key);
      auto error = parse_error(answer);
      if (!error) return parse_group_name(answer, group_);
      if (late || error->kind() != ErrorKind::kTimeout) throw *error;
      refusal = std::move(error);
      attempt = own.make(world_);
      continue;
    }
    alive(0);
    if (left(deadline) > milliseconds(0)) continue;
    if (refusal) throw *refusal;
    if (late || lowest_follower() == rank_) refuse(absent());
    late = true;  // another one decides
    deadline = Clock::now() + kGrace;
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

std::string store_prefix(const std::string& name) { return "dpcomm/" + name + "/"; }

std::string agree_on_name(c10d::Store& store, int rank, int world, const std::string& group,
                          milliseconds timeout) {
  if (world == 1) return unique_name(group);
  Attempts own(store, rank);
  Agreement agreement(store, rank, world, group, timeout);
  int64_t attempt = 0;
  try {
    attempt = own.make(world);
    const std::string name = rank == 0 ? agreement.lead(attempt) : agreement.follow(attempt);
    if (rank == 0) own.mark_answered(attempt);
    return name;
  } catch (const Error& error) {
    const Error told = agreement.explained(error);
    try {
      if (attempt != 0) own.mark_answered(attempt);
    } catch (const std::exception&) {  // the store is gone: nobody will ask it
    }
    throw told;
  } catch (const std::exception& error) {
    throw agreement.explained(store_failed(error));
  }
}

}  // namespace dpcomm
