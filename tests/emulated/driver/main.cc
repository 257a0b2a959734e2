// Runs cases (case.h) from standard input, one after the other. For each it answers with a line
//   result status=ok|stuck|fault|usage turns=N text=BYTES outputs=BYTES
// and so many bytes of text (the error, or lines of counts and waits) and of outputs.
#include <cstdio>
#include <exception>
#include <iostream>

#include "base/error.h"
#include "case.h"
#include "emulator.h"
#include "ranks.h"

namespace dpcomm::emulated {
namespace {

std::string counts_text(const World& world, int ranks) {
  constexpr const char* kKinds[kMemoryClasses] = {"tensor", "staging", "state", "host"};
  std::string text;
  for (int rank = 0; rank < ranks; ++rank) {
    const RankCounts& counts = world.counts(rank);
    text += str("counts rank=", rank, " fences=", counts.fences, " acquires=", counts.acquires,
                " polls=", counts.polls, " flag_stores=", counts.flag_stores,
                " packet_stores=", counts.packet_stores, " packet_polls=", counts.packet_polls);
    for (int kind = 0; kind < kMemoryClasses; ++kind) {
      for (int remote = 0; remote < 2; ++remote) {
        const AccessCounts& data = counts.data[kind][remote];
        const std::string name = str(" ", kKinds[kind], remote ? "_remote_" : "_");
        if (data.read_bytes + data.written_bytes == 0) continue;
        text +=
            str(name, "read_bytes=", data.read_bytes, name, "written_bytes=", data.written_bytes,
                name, "wide_reads=", data.wide_reads, name, "wide_writes=", data.wide_writes, name,
                "small_reads=", data.small_reads, name, "small_writes=", data.small_writes);
      }
    }
    text += "\n";
  }
  return text;
}

void run_sweeps(const Case& the_case, Ranks& ranks, World& world) {
  ranks.launch(world);
  int64_t sweep = 0;
  do {
    if (sweep == the_case.abort_at) ranks.abort(the_case.abort_rank);
    if (sweep == the_case.abort_all_at) {
      for (int rank = 0; rank < the_case.world; ++rank) ranks.abort(rank);
    }
    ++sweep;
  } while (world.advance());
  world.run();
}

void answer(const char* status, uint64_t turns, const std::string& text,
            const std::string& outputs) {
  std::cout << "result status=" << status << " turns=" << turns << " text=" << text.size()
            << " outputs=" << outputs.size() << "\n"
            << text << outputs << std::flush;
}

void run_case(const Case& the_case) {
  try {
    Ranks ranks(the_case);
    WorldOptions options;
    options.seed = the_case.seed;
    options.max_resident = the_case.resident;
    options.patience = the_case.patience;
    options.limit_s = the_case.limit_s;
    options.count = the_case.count;
    options.memory = &ranks.map();
    options.outside_writers = false;
    World world(options);
    try {
      run_sweeps(the_case, ranks, world);
      ranks.check();
      std::string text = ranks.waits();
      if (the_case.count) text += counts_text(world, the_case.world);
      answer("ok", world.turns(), text, ranks.outputs());
    } catch (const Stuck& stuck) {
      answer("stuck", world.turns(), stuck.what() + ranks.waits(), "");
    } catch (const Fault& fault) {
      answer("fault", world.turns(), fault.what(), "");
    }
  } catch (const Error& error) {
    answer("usage", 0, error.what(), "");
  }
}

int run() {
  std::ios::sync_with_stdio(false);
  try {
    for (;;) {
      Case the_case;
      if (!read_case(std::cin, the_case)) return 0;
      run_case(the_case);
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "emulate: %s\n", error.what());
    return 2;
  }
}

}  // namespace
}  // namespace dpcomm::emulated

int main() { return dpcomm::emulated::run(); }
