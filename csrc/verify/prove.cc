#include "verify/prove.h"

#include <algorithm>
#include <deque>

#include "base/error.h"
#include "verify/channels.h"
#include "verify/values.h"

namespace dpcomm {
namespace {

// Law 3, for the one schedule whose need grows with its slices; the proof shows that it is enough.
constexpr ScheduleParams kFourRanksThreeSlices{0, 4, 0, 3};
static_assert(RingAllReduce::min_slots(kFourRanksThreeSlices) == 3 + 1);

/// Thrown where a plan is refuted.
struct Refuted {
  std::string why;
};

/// Fingerprints of what happens to a value.
enum Mark : uint64_t { kOwn = 1, kRounded, kReduced, kDivided };

constexpr int kMaxLanes = 8;

/// What a phase has done to the slices of all ranks.
struct PhaseState {
  struct Slice {
    bool written = false;
    uint8_t read_once = 0;   ///< lanes that have read the input
    uint8_t read_again = 0;  ///< lanes that have read it more than once
  };
  struct Result {
    uint64_t fingerprint = 0;
    int32_t rank = -1;  ///< the first that wrote it
  };
  std::vector<Slice> slices;    ///< [rank][round][chunk][slice]
  std::vector<Result> results;  ///< [round][chunk][slice]
};

struct RankState {
  int phase = 0;
  size_t next[kMaxLanes] = {};    ///< index of the next step of each lane
  int32_t ready[kMaxLanes] = {};  ///< peers of that step already seen to be ready
  bool queued = false;
};

class Prover {
 public:
  Prover(const Plan& plan, const ProofOptions& options)
      : plan_(plan),
        options_(options),
        channels_(plan, options.slots),
        values_(plan.world),
        ranks_(plan.world),
        states_(plan.phases.size()) {}

  Proof run() {
    try {
      for (size_t i = 0; i < plan_.phases.size(); ++i) prepare(i);
      for (int rank = 0; rank < plan_.world; ++rank) wake(rank);
      while (!queue_.empty()) {
        const int rank = queue_.front();
        queue_.pop_front();
        ranks_[rank].queued = false;
        advance(rank);
      }
      check_finished();
      check_leftovers();
      check_outputs();
      proof_.holds = true;
    } catch (const Refuted& refuted) {
      proof_.error = refuted.why;
    }
    return proof_;
  }

 private:
  /// The step that a check or an error is about.
  struct At {
    int phase;
    int rank;
    int lane;
    size_t index;
    const PlannedStep& planned;
    const Step& step() const { return planned.step; }
  };

  const Phase& phase(int i) const { return plan_.phases[i]; }

  // --- before the execution ---------------------------------------------------------------------

  void prepare(size_t i) {
    const Phase& phase = plan_.phases[i];
    const size_t slices = slices_of(phase);
    states_[i].slices.resize(slices * plan_.world);
    states_[i].results.resize(slices);
    senders_.assign(channels_.size(), -1);
    receivers_.assign(channels_.size(), -1);
    for (int rank = 0; rank < plan_.world; ++rank) {
      for (int lane = 0; lane < phase.lanes; ++lane) {
        const std::vector<PlannedStep>& stream = phase.stream(rank, lane);
        for (size_t index = 0; index < stream.size(); ++index) {
          check_form(At{static_cast<int>(i), rank, lane, index, stream[index]});
        }
      }
    }
  }

  static size_t slices_of(const Phase& phase) {
    return static_cast<size_t>(phase.operation.rounds) * phase.chunks * phase.operation.slices;
  }

  void check_form(const At& at) {
    static constexpr uint8_t kLegal[] = {kSend,
                                         kCopy | kSend,
                                         kCopy,
                                         kRecv | kCopy,
                                         kRecv | kSend,
                                         kRecv | kCopy | kSend,
                                         kRecv | kReduce | kSend,
                                         kRecv | kReduce | kCopy,
                                         kRecv | kReduce | kCopy | kSend};
    const Step& step = at.step();
    const Phase& phase = this->phase(at.phase);
    if (options_.check_form &&
        std::find(std::begin(kLegal), std::end(kLegal), step.primitive) == std::end(kLegal)) {
      refute(at, "is not a primitive that exists");
    }
    if (step.chunk < 0 || step.chunk >= phase.chunks || step.slice < 0 ||
        step.slice >= phase.operation.slices) {
      refute(at, "names a chunk or slice that does not exist");
    }
    if (step.has(kRecv) == step.recv_peers.empty() || step.has(kSend) == step.send_peers.empty()) {
      refute(at, "has peers that do not fit its primitive");
    }
    if (options_.check_form && step.has(kRecv) && !step.has(kReduce) &&
        step.recv_peers.count() != 1) {
      refute(at, "receives from several peers without a reduction");
    }
    check_peers(at, step.recv_peers, step.recv_lane, false);
    check_peers(at, step.send_peers, step.send_lane, true);
  }

  void check_peers(const At& at, const Peers& peers, int channel_lane, bool sends) {
    for (int i = 0; i < peers.count(); ++i) {
      const int peer = peers[i];
      if (peer < 0 || peer >= plan_.world || peer == at.rank) {
        refute(at, str("has rank ", peer, " as a peer"));
      }
      if (!channels_.has_lane(channel_lane)) refute(at, str("uses lane ", channel_lane));
      for (int j = 0; j < i && peers.count() <= Peers::kMaxListed; ++j) {
        if (peers[j] == peer) refute(at, str("has rank ", peer, " as a peer twice"));
      }
      const Channels::Index channel = sends ? channels_.index(at.rank, peer, channel_lane)
                                            : channels_.index(peer, at.rank, channel_lane);
      int8_t& owner = sends ? senders_[channel] : receivers_[channel];
      if (owner >= 0 && owner != at.lane) {
        refute(at, str("shares the channel ", describe(channel), " with lane ", int{owner}));
      }
      owner = static_cast<int8_t>(at.lane);
    }
  }

  // --- the execution ----------------------------------------------------------------------------

  void wake(int rank) {
    if (ranks_[rank].queued) return;
    ranks_[rank].queued = true;
    queue_.push_back(rank);
  }

  /// Runs all steps of `rank` that can run.
  void advance(int rank) {
    RankState& state = ranks_[rank];
    while (state.phase < static_cast<int>(plan_.phases.size())) {
      bool ended = true;
      bool progress = false;
      for (int lane = 0; lane < phase(state.phase).lanes; ++lane) {
        const std::vector<PlannedStep>& stream = phase(state.phase).stream(rank, lane);
        while (state.next[lane] < stream.size()) {
          const At at{state.phase, rank, lane, state.next[lane], stream[state.next[lane]]};
          if (!ready(at)) break;
          run(at);
          ++state.next[lane];
          state.ready[lane] = 0;
          progress = true;
        }
        ended = ended && state.next[lane] == stream.size();
      }
      if (ended) {
        ++state.phase;
        std::fill(std::begin(state.next), std::end(state.next), 0);
      } else if (!progress) {
        return;
      }
    }
  }

  /// The channel that the step at `at` waits for next, looking at peers from number `i` on, the
  /// receiving side first; false if it can run.
  bool first_unready(const At& at, int32_t& i, Channels::Index& channel, bool& sends) const {
    const Step& step = at.step();
    const int receives = step.recv_peers.count();
    for (; i < receives + step.send_peers.count(); ++i) {
      sends = i >= receives;
      channel = sends ? channels_.index(at.rank, step.send_peers[i - receives], step.send_lane)
                      : channels_.index(step.recv_peers[i], at.rank, step.recv_lane);
      if (sends ? channels_.full(channel) : channels_.empty(channel)) return true;
    }
    return false;
  }

  bool ready(const At& at) {
    Channels::Index channel;
    bool sends;
    return !first_unready(at, ranks_[at.rank].ready[at.lane], channel, sends);
  }

  void run(const At& at) {
    const Step& step = at.step();
    ++proof_.steps;
    Values::Id value;
    if (step.has(kReduce)) {
      value = reduce(at);
    } else if (step.has(kRecv)) {
      value = receive(at, step.recv_peers[0]);
    } else {
      value = own(at);
    }
    const bool lossy = reduces(phase(at.phase).info().collective);
    const bool made_here = step.has(kReduce) || !step.has(kRecv);
    if (step.has(kCopy) && lossy && made_here) mark(value, kDivided);
    Values::Id sent = value;
    if (step.has(kSend)) {
      if (lossy && made_here) {
        sent = values_.copy(value);
        mark(sent, kRounded);
      }
      send(at, sent);
    }
    if (step.has(kCopy)) keep(at, options_.keep_as_sent ? sent : value);
    if (sent != value) values_.release(sent);
    values_.release(value);
  }

  void mark(Values::Id id, Mark mark) {
    Values::Value& value = values_[id];
    value.fingerprint = Values::mix(value.fingerprint, mark);
    if (mark == kDivided) value.complete = true;
    if (mark == kRounded) ++value.roundings;
  }

  Values::Id own(const At& at) {
    read(at);
    const Values::Id id = values_.make(key(at));
    values_.add_contribution(id, at.rank);
    values_[id].fingerprint = Values::mix(kOwn, static_cast<uint64_t>(at.rank));
    if (at.step().own_as_sent) mark(id, kRounded);
    return id;
  }

  Values::Id receive(const At& at, int peer) {
    const Channels::Index channel = channels_.index(peer, at.rank, at.step().recv_lane);
    const Values::Id id = channels_.pop(channel);
    wake(peer);
    if (values_[id].key != key(at)) {
      refute(at,
             str("gets ", describe_key(values_[id].key), " on the channel ", describe(channel)));
    }
    return id;
  }

  /// Combines the contributions of all peers and the own one in ascending order of rank.
  Values::Id reduce(const At& at) {
    const Peers& peers = at.step().recv_peers;
    parts_.clear();
    parts_.push_back(at.rank);
    for (int i = 0; i < peers.count(); ++i) parts_.push_back(peers[i]);
    std::sort(parts_.begin(), parts_.end());
    const Values::Id sum = values_.make(key(at));
    values_[sum].fingerprint = kReduced;
    for (const int rank : parts_) {
      const Values::Id part = rank == at.rank ? own(at) : receive(at, rank);
      if (values_[part].complete) refute(at, str("adds a complete result of rank ", rank));
      const int twice = values_.merge(sum, part);
      if (twice >= 0) refute(at, str("adds the contribution of rank ", twice, " twice"));
      Values::Value& into = values_[sum];
      into.fingerprint = Values::mix(into.fingerprint, values_[part].fingerprint);
      into.roundings = std::max(into.roundings, values_[part].roundings);
      values_.release(part);
    }
    return sum;
  }

  void send(const At& at, Values::Id id) {
    const Peers& peers = at.step().send_peers;
    for (int i = 0; i < peers.count(); ++i) {
      channels_.push(channels_.index(at.rank, peers[i], at.step().send_lane), id);
      ++values_[id].references;
      ++proof_.messages;
      wake(peers[i]);
    }
  }

  // --- input and output of a rank ---------------------------------------------------------------

  /// Index of the step's slice among those of the phase.
  size_t slice_index(const At& at) const {
    const Phase& phase = this->phase(at.phase);
    const size_t chunk = static_cast<size_t>(at.planned.round) * phase.chunks + at.step().chunk;
    return chunk * phase.operation.slices + at.step().slice;
  }
  int64_t key(const At& at) const {
    return static_cast<int64_t>(at.phase) << 48 | static_cast<int64_t>(slice_index(at));
  }
  PhaseState::Slice& slice(const At& at) {
    return states_[at.phase].slices[slices_of(phase(at.phase)) * at.rank + slice_index(at)];
  }

  void read(const At& at) {
    const Phase& phase = this->phase(at.phase);
    if (!has_input(phase, at.rank, at.step().chunk)) {
      refute(at, "reads an input that the rank does not have");
    }
    PhaseState::Slice& slice = this->slice(at);
    if (slice.written) refute(at, "reads its input after its output was written over it");
    const uint8_t bit = static_cast<uint8_t>(1u << at.lane);
    slice.read_again |= slice.read_once & bit;
    slice.read_once |= bit;
  }

  /// Whose input a chunk is where it is one rank's alone, else -1.
  int source_of(const Phase& phase, int chunk) const {
    switch (phase.info().collective) {
      case Collective::kBroadcast:
      case Collective::kScatter:
        return phase.operation.root;
      case Collective::kAllGather:
      case Collective::kGather:
        return chunk;
      case Collective::kAllToAll:
        return chunk / plan_.world;
      default:
        return -1;
    }
  }

  /// Whose output it is where it is one rank's alone, else -1. In an all-to-all source and
  /// destination are all that there is to a chunk: it ends at the one, at the place of the other.
  int destination_of(const Phase& phase, int chunk) const {
    switch (phase.info().collective) {
      case Collective::kReduce:
      case Collective::kGather:
        return phase.operation.root;
      case Collective::kReduceScatter:
      case Collective::kScatter:
        return chunk;
      case Collective::kAllToAll:
        return chunk % plan_.world;
      default:
        return -1;
    }
  }

  bool has_input(const Phase& phase, int rank, int chunk) const {
    const int source = source_of(phase, chunk);
    return source < 0 || source == rank;
  }
  bool has_output(const Phase& phase, int rank, int chunk) const {
    const int destination = destination_of(phase, chunk);
    return destination < 0 || destination == rank;
  }

  void keep(const At& at, Values::Id id) {
    const Phase& phase = this->phase(at.phase);
    if (!has_output(phase, at.rank, at.step().chunk)) {
      refute(at, "writes an output that the rank does not have");
    }
    PhaseState::Slice& slice = this->slice(at);
    if (slice.written) refute(at, "writes its output a second time");
    slice.written = true;
    const int others = slice.read_once & ~(1u << at.lane);
    if (others != 0 && (__builtin_popcount(others) > 1 || (slice.read_again & others) != 0 ||
                        !values_.has_contribution(id, at.rank))) {
      refute(at, "may write its output before another lane has read the input");
    }
    check_value(at, id);
    proof_.roundings = std::max(proof_.roundings, values_[id].roundings);
    PhaseState::Result& result = states_[at.phase].results[slice_index(at)];
    if (result.rank < 0) {
      result = {values_[id].fingerprint, at.rank};
    } else if (result.fingerprint != values_[id].fingerprint) {
      refute(at, str("keeps another value than rank ", result.rank,
                     " (order of additions, or rounding on the wire)"));
    }
  }

  void check_value(const At& at, Values::Id id) {
    const Phase& phase = this->phase(at.phase);
    if (!reduces(phase.info().collective)) {
      const int from = source_of(phase, at.step().chunk);
      if (values_.contributions(id) == 1 && values_.has_contribution(id, from)) return;
      refute(at, str("keeps a value that is not the input of rank ", from));
    }
    if (!values_[id].complete) refute(at, "keeps a partial result");
    if (values_.contributions(id) == plan_.world) return;
    for (int rank = 0; rank < plan_.world; ++rank) {
      if (values_.has_contribution(id, rank)) continue;
      refute(at, str("keeps a result without the contribution of rank ", rank));
    }
  }

  // --- after the execution ----------------------------------------------------------------------

  /// The first lane of `rank` that has not ended, as a sentence; `peer` is whom it waits for.
  std::string describe_wait(int rank, int& peer) const {
    const RankState& state = ranks_[rank];
    for (int lane = 0; lane < phase(state.phase).lanes; ++lane) {
      const std::vector<PlannedStep>& stream = phase(state.phase).stream(rank, lane);
      if (state.next[lane] >= stream.size()) continue;
      const At at{state.phase, rank, lane, state.next[lane], stream[state.next[lane]]};
      int32_t i = 0;
      Channels::Index channel = 0;
      bool sends = false;
      if (!first_unready(at, i, channel, sends)) continue;
      peer = sends ? channels_.destination(channel) : channels_.source(channel);
      return str(describe(at), " waits for ", sends ? "a free slot" : "a message",
                 " on the channel ", describe(channel));
    }
    return {};
  }

  void check_finished() const {
    const int end = static_cast<int>(plan_.phases.size());
    for (int rank = 0; rank < plan_.world; ++rank) {
      if (ranks_[rank].phase == end) continue;
      std::string text = str("deadlock (slots = ", options_.slots, "): ");
      std::vector<int> seen;
      for (int at = rank; std::find(seen.begin(), seen.end(), at) == seen.end();) {
        seen.push_back(at);
        int peer = at;
        if (seen.size() > 4) {
          text += "; and so on";
          break;
        }
        if (seen.size() > 1) text += "; ";
        if (ranks_[at].phase == end) {
          text += str("rank ", at, " has ended");
          break;
        }
        text += describe_wait(at, peer);
        at = peer;
      }
      throw Refuted{text};
    }
  }

  void check_leftovers() const {
    for (Channels::Index i = 0; i < channels_.size(); ++i) {
      if (channels_.empty(i)) continue;
      throw Refuted{str("left over on the channel ", describe(i), ": ", channels_.count(i),
                        " of its messages, the first with ",
                        describe_key(values_[channels_.front(i)].key))};
    }
  }

  void check_outputs() const {
    for (size_t i = 0; i < plan_.phases.size(); ++i) {
      const Phase& phase = plan_.phases[i];
      const size_t per_rank = slices_of(phase);
      for (size_t at = 0; at < states_[i].slices.size(); ++at) {
        const int rank = static_cast<int>(at / per_rank);
        const size_t index = at % per_rank;
        const int chunk = static_cast<int>(index / phase.operation.slices % phase.chunks);
        if (states_[i].slices[at].written || !has_output(phase, rank, chunk)) continue;
        const size_t round = index / (static_cast<size_t>(phase.operation.slices) * phase.chunks);
        if (!phase.operation.has(static_cast<int>(round), chunk)) continue;
        throw Refuted{
            str("rank ", rank, " never writes ",
                describe_key(static_cast<int64_t>(i) << 48 | static_cast<int64_t>(index)))};
      }
    }
  }

  // --- words ------------------------------------------------------------------------------------

  std::string describe(Channels::Index i) const {
    return str(channels_.source(i), " -> ", channels_.destination(i), " of lane ",
               channels_.lane(i));
  }

  std::string describe_key(int64_t key) const {
    const size_t index = static_cast<size_t>(key & ((int64_t{1} << 48) - 1));
    const Phase& phase = this->phase(static_cast<int>(key >> 48));
    const size_t chunk = index / phase.operation.slices;
    return str("chunk ", chunk % phase.chunks, ", slice ", index % phase.operation.slices,
               ", round ", chunk / phase.chunks, " of ", name(phase.info().collective), " ",
               phase.info().name);
  }

  std::string describe(const At& at) const {
    return str("rank ", at.rank, ", lane ", at.lane, ", step ", at.index, " (",
               primitive_name(at.step().primitive), " of ", describe_key(key(at)), ")");
  }

  [[noreturn]] void refute(const At& at, const std::string& why) const {
    throw Refuted{describe(at) + " " + why};
  }

  const Plan& plan_;
  ProofOptions options_;
  Channels channels_;
  Values values_;
  std::vector<RankState> ranks_;
  std::vector<PhaseState> states_;
  std::vector<int8_t> senders_, receivers_;  ///< lane at each end of a channel, -1 for none
  std::deque<int> queue_;                    ///< ranks that may have a step to run
  std::vector<int> parts_;
  Proof proof_;
};

}  // namespace

Proof prove(const Plan& plan, const ProofOptions& options) { return Prover(plan, options).run(); }

}  // namespace dpcomm
