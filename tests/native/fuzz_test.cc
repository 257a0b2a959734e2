// Fuzzes what reads strangers' bytes (fuzz/targets.h), guided by coverage, with g++ alone: the
// sources in question are compiled with -fsanitize-coverage=trace-pc, and inputs that reach a new
// place are kept and changed further. A few seconds; --long: a minute for each target.
//
// libFuzzer does the same where clang is there (fuzz/run_libfuzzer.sh).
#include <chrono>
#include <cstdio>
#include <random>

#include "check.h"
#include "fuzz/targets.h"

namespace {

constexpr size_t kPlaces = 1 << 16;
uint8_t hits[kPlaces];
bool recording = false;

}  // namespace

/// Called by instrumented code at every edge.
extern "C" __attribute__((no_sanitize("address", "undefined", "thread"))) void
__sanitizer_cov_trace_pc() {
  if (!recording) return;
  const auto place = reinterpret_cast<uintptr_t>(__builtin_return_address(0));
  uint8_t& count = hits[(place ^ (place >> 16)) % kPlaces];
  if (count < 255) ++count;
}

namespace dpcomm::fuzz {
namespace {

constexpr size_t kMaxBytes = 2048;

class Fuzzer {
 public:
  Fuzzer(const Target& target, uint64_t seed) : target_(target), random_(seed) {}

  void run(std::chrono::milliseconds time) {
    for (const Bytes& seed : target_.seeds) attempt(seed);
    attempt("");
    const auto end = std::chrono::steady_clock::now() + time;
    while (std::chrono::steady_clock::now() < end) {
      for (int i = 0; i < 20; ++i) attempt(changed(corpus_[below(corpus_.size())]));
    }
    std::printf("  %-9s %8zu inputs, %4zu kept, %5zu places\n", target_.name, inputs_,
                corpus_.size(), places_);
    CHECK(places_ > 1);
  }

 private:
  size_t below(size_t limit) { return random_() % limit; }

  void attempt(const Bytes& bytes) {
    ++inputs_;
    std::memset(hits, 0, sizeof(hits));
    recording = true;
    target_.run(bytes);
    recording = false;
    bool fresh = corpus_.empty();
    for (size_t i = 0; i < kPlaces; ++i) {
      if (hits[i] == 0) continue;
      const auto bucket = static_cast<uint8_t>(1 << (hits[i] > 127 ? 7 : hits[i] / 16));
      if (seen_[i] & bucket) continue;
      places_ += seen_[i] == 0;
      seen_[i] |= bucket;
      fresh = true;
    }
    if (fresh) corpus_.push_back(bytes);
  }

  Bytes changed(Bytes bytes) {
    for (size_t turns = 1 + below(4); turns > 0; --turns) change(bytes);
    if (bytes.size() > kMaxBytes) bytes.resize(kMaxBytes);
    return bytes;
  }

  void change(Bytes& bytes) {
    static const Bytes kTokens[] = {"-1",
                                    "0",
                                    "18446744073709551616",
                                    "999999999999999999999",
                                    " ",
                                    "/",
                                    "\n",
                                    Bytes(1, '\0'),
                                    "\xff\xff\xff\xff",
                                    "error ",
                                    "/../",
                                    "dpcomm-",
                                    "\xc3",
                                    Bytes(600, 'a'),
                                    "2147483648"};
    const size_t at = bytes.empty() ? 0 : below(bytes.size());
    switch (below(8)) {
      case 0:
        if (!bytes.empty()) bytes[at] = static_cast<char>(bytes[at] ^ (1 << below(8)));
        break;
      case 1:
        if (!bytes.empty()) bytes[at] = static_cast<char>(random_());
        break;
      case 2:
        bytes.insert(at, kTokens[below(std::size(kTokens))]);
        break;
      case 3:
        bytes.erase(at, 1 + below(8));
        break;
      case 4:
        bytes.resize(at);
        break;
      case 5: {
        const Bytes& other = corpus_[below(corpus_.size())];
        if (!other.empty()) bytes.insert(at, other.substr(below(other.size())));
        break;
      }
      case 6: {  // a number by another one
        size_t end = at;
        while (end < bytes.size() && bytes[end] >= '0' && bytes[end] <= '9') ++end;
        bytes.replace(at, end - at, std::to_string(static_cast<int64_t>(random_())));
        break;
      }
      default:
        for (size_t i = at; i < bytes.size() && i < at + 8; ++i) {
          bytes[i] = static_cast<char>(random_());
        }
    }
  }

  const Target& target_;
  std::mt19937_64 random_;
  std::vector<Bytes> corpus_;
  uint8_t seen_[kPlaces] = {};
  size_t inputs_ = 0, places_ = 0;
};

TEST(strangers_bytes) {
  const std::chrono::milliseconds time(check::long_run() ? 60000 : 700);
  for (const Target& target : targets()) {
    std::make_unique<Fuzzer>(target, check::seed())->run(time);
  }
}

/// A rank that says it last ran at a time that cannot be told from now.
TEST(the_ends_of_time) {
  for (const int64_t alive_ns : {INT64_MIN, INT64_MIN + 1, int64_t{-1}, INT64_MAX}) {
    Arena arena;
    OpRecord record;
    record.sequence = 1;
    record.alive_ns = alive_ns;
    arena.peer().on_host.announce(record);
    Diagnosis(arena, Place::kHost).not_moving(record);
  }
}

/// No moment of a record's life, nor any other number in its place, keeps a reader for long.
TEST(records_that_nobody_completes) {
  std::mt19937_64 random(check::seed());
  for (int turn = 0; turn < 5; ++turn) {
    Arena arena;
    auto* words = reinterpret_cast<uint32_t*>(&arena.peer());
    for (size_t i = 0; i < sizeof(RankLine) / sizeof(uint32_t); ++i) {
      words[i] = static_cast<uint32_t>(random());
    }
    arena.failure_word().first.store(turn == 0 ? 1 : static_cast<uint32_t>(random() | 1));
    CHECK(arena.failure().has_value());
    CHECK(!Diagnosis(arena, Place::kHost).report(arena.announced(0, Place::kHost)).empty());
  }
}

}  // namespace
}  // namespace dpcomm::fuzz
