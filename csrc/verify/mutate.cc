#include "verify/mutate.h"

#include <utility>

#include "verify/values.h"

namespace dpcomm {
namespace {

/// A place in a plan where a fault can be planted; `other` is a second step of the same stream.
struct Place {
  std::vector<PlannedStep>* stream;
  const Phase* phase;
  size_t index;
  size_t other;
};

bool shares_channel(const Step& a, const Step& b) {
  for (int i = 0; i < a.recv_peers.count(); ++i) {
    for (int j = 0; j < b.recv_peers.count(); ++j) {
      if (a.recv_peers[i] == b.recv_peers[j] && a.recv_lane == b.recv_lane) return true;
    }
  }
  for (int i = 0; i < a.send_peers.count(); ++i) {
    for (int j = 0; j < b.send_peers.count(); ++j) {
      if (a.send_peers[i] == b.send_peers[j] && a.send_lane == b.send_lane) return true;
    }
  }
  return false;
}

bool reads_input(const Step& step) { return !step.has(kRecv) || step.has(kReduce); }

bool writes_first(const PlannedStep& reader, const PlannedStep& writer) {
  return writer.step.has(kCopy) && writer.round == reader.round &&
         writer.step.chunk == reader.step.chunk && writer.step.slice == reader.step.slice;
}

void use_one_lane(Plan& plan) {
  for (Phase& phase : plan.phases) {
    const uint8_t first = static_cast<uint8_t>(phase.info().first_lane);
    for (std::vector<PlannedStep>& stream : phase.streams) {
      for (PlannedStep& planned : stream) planned.step.recv_lane = planned.step.send_lane = first;
    }
  }
}

/// Whether the fault can be planted at step `index`; finds `other` where two steps are needed.
bool fits(Mutation mutation, const Plan& plan, const Place& place, size_t& other) {
  const std::vector<PlannedStep>& stream = *place.stream;
  const Step& step = stream[place.index].step;
  switch (mutation) {
    case Mutation::kDropReduce:
      return step.has(kReduce);
    case Mutation::kDropStep:
      return true;
    case Mutation::kWrongChunk:
      return place.phase->chunks > 1 || place.phase->operation.slices > 1;
    case Mutation::kDropCopy:
      return step.has(kCopy);
    case Mutation::kSwapSteps:
      for (other = place.index + 1; other < stream.size(); ++other) {
        if (shares_channel(step, stream[other].step)) return true;
      }
      return false;
    case Mutation::kWrongPeer:
      return plan.world > 2 && (step.has(kRecv) || step.has(kSend));
    case Mutation::kNotAsSent:
      return step.own_as_sent;
    case Mutation::kRepeatStep:
      return true;
    case Mutation::kWriteFirst:
      for (other = place.index + 1; other < stream.size(); ++other) {
        if (reads_input(step) && writes_first(stream[place.index], stream[other])) return true;
      }
      return false;
    case Mutation::kOneLane:
      return place.phase->lanes > 1;
    case Mutation::kMutations:
      break;
  }
  return false;
}

void plant(Mutation mutation, const Plan& plan, const Place& place, uint64_t seed) {
  std::vector<PlannedStep>& stream = *place.stream;
  Step& step = stream[place.index].step;
  const int rank =
      static_cast<int>((place.stream - place.phase->streams.data()) / place.phase->lanes);
  switch (mutation) {
    case Mutation::kDropReduce:
      step.primitive &= static_cast<uint8_t>(~kReduce);
      break;
    case Mutation::kDropStep:
      stream.erase(stream.begin() + static_cast<std::ptrdiff_t>(place.index));
      break;
    case Mutation::kWrongChunk:
      if (place.phase->chunks > 1) {
        step.chunk = (step.chunk + 1) % place.phase->chunks;
      } else {
        step.slice = (step.slice + 1) % place.phase->operation.slices;
      }
      break;
    case Mutation::kDropCopy:
      step.primitive &= static_cast<uint8_t>(~kCopy);
      break;
    case Mutation::kSwapSteps:
    case Mutation::kWriteFirst:
      std::swap(stream[place.index], stream[place.other]);
      break;
    case Mutation::kWrongPeer: {
      Peers& peers =
          !step.has(kRecv) || (step.has(kSend) && seed % 2) ? step.send_peers : step.recv_peers;
      int32_t peer = peers[0];
      if (peers.count() == 1) {
        do {
          peer = (peer + 1) % plan.world;
        } while (peer == rank);
      }
      peers = Peers::one(peer);  // another one, or one in place of several
      break;
    }
    case Mutation::kNotAsSent:
      step.own_as_sent = false;
      break;
    case Mutation::kRepeatStep:
      stream.insert(stream.begin() + static_cast<std::ptrdiff_t>(place.index),
                    PlannedStep(stream[place.index]));
      break;
    case Mutation::kOneLane:
      break;  // not at one place
    case Mutation::kMutations:
      break;
  }
}

}  // namespace

bool mutate(Plan& plan, Mutation mutation, uint64_t seed) {
  std::vector<Place> places;
  for (Phase& phase : plan.phases) {
    for (std::vector<PlannedStep>& stream : phase.streams) {
      for (size_t index = 0; index < stream.size(); ++index) {
        Place place{&stream, &phase, index, index};
        if (fits(mutation, plan, place, place.other)) places.push_back(place);
      }
    }
  }
  if (places.empty()) return false;
  if (mutation == Mutation::kOneLane) {
    use_one_lane(plan);
    return true;
  }
  const uint64_t draw = Values::mix(seed, static_cast<uint64_t>(mutation));
  plant(mutation, plan, places[draw % places.size()], draw);
  return true;
}

}  // namespace dpcomm
