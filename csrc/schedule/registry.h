// The list of schedules as data, and a visitor that turns an index into a type.
#pragma once

#include <cstring>
#include <string_view>
#include <type_traits>
#include <utility>

#include "schedule/algorithms.h"

namespace dpcomm {

/// An algorithm is a named schedule. Indexes into kAlgorithms are the same on all ranks.
struct AlgorithmInfo {
  Collective collective;
  const char* name;
  int lanes;          ///< streams of steps
  int first_lane;     ///< of the channels used
  int channel_lanes;  ///< number of lanes of channels used
  int (*chunks)(const ScheduleParams&);
  int (*min_slots)(const ScheduleParams&);
  int (*roundings)(const ScheduleParams&);
};

inline constexpr AlgorithmInfo kAlgorithms[] = {
#define DPCOMM_ALGORITHM(collective, name, Class)                                \
  {Collective::collective, name,           Class::kLanes,     Class::kFirstLane, \
   Class::kChannelLanes,   &Class::chunks, &Class::min_slots, &Class::roundings},
#include "schedule/algorithms.def"
#include "schedule/host_algorithms.def"
#undef DPCOMM_ALGORITHM
};
inline constexpr int kAlgorithmCount = sizeof(kAlgorithms) / sizeof(kAlgorithms[0]);

/// Index of an algorithm, or -1.
constexpr int find_algorithm(Collective collective, std::string_view name) {
  for (int i = 0; i < kAlgorithmCount; ++i) {
    if (kAlgorithms[i].collective == collective && name == kAlgorithms[i].name) return i;
  }
  return -1;
}

/// Calls visitor(std::type_identity<Schedule>()) for the schedule at `index`.
template <class Visitor>
DPCOMM_HD decltype(auto) visit_schedule(int index, Visitor&& visitor) {
  int i = 0;
#define DPCOMM_ALGORITHM(collective, name, Class) \
  if (index == i++) return visitor(std::type_identity<Class>());
#include "schedule/algorithms.def"
#include "schedule/host_algorithms.def"
#undef DPCOMM_ALGORITHM
  return visitor(std::type_identity<TwoShotAllReduce>());  // unreachable for a valid index
}

/// Lanes of channels that a transport must provide: the most that any schedule uses.
constexpr int channel_lanes() {
  int lanes = 1;
  for (const AlgorithmInfo& algorithm : kAlgorithms) {
    const int last = algorithm.first_lane + algorithm.channel_lanes;
    lanes = last > lanes ? last : lanes;
  }
  return lanes;
}

}  // namespace dpcomm
