#include "comm/tuner.h"

#include <string_view>

#include "cuda/launch_plan.h"
#include "schedule/registry.h"

namespace dpcomm {
namespace {

constexpr size_t kSmallestLossyBytes = size_t{16} << 10;  // below, a lossy wire gains nothing
constexpr size_t kOneShotBytes = size_t{32} << 10;        // of all contributions together
constexpr size_t kOneShotDeviceBytes = size_t{256} << 10;
constexpr int kMaxInt8Roundings = 2;

/// The algorithm of `auto` within a host. All of them add in the order of ranks and round once, so
/// that the bits do not depend on the choice (DESIGN §6).
std::string_view automatic(const Operation& operation, int world) {
  if (operation.collective == Collective::kBarrier) return "one_shot";
  if (operation.collective != Collective::kAllReduce) return "direct";
  const size_t bytes = operation.count * size_bytes(operation.dtype);
  return bytes * (world - 1) <= kOneShotBytes ? "one_shot" : "two_shot";
}

/// The same between the devices of a host: by packets as far as they suffice.
std::string_view automatic_on_device(const Operation& operation, WireFormat wire,
                                     const StagingGeometry& device) {
  if (operation.collective != Collective::kAllReduce) return "direct";
  const size_t bytes = operation.count * size_bytes(operation.dtype);
  if (bytes > kOneShotDeviceBytes) return "two_shot";
  const size_t packets =
      packets_needed(wire, operation.dtype, operation.count, choose_ctas(bytes, device.ctas));
  return packets <= device.packet_capacity ? "one_shot" : "two_shot";
}

bool exists(std::string_view algorithm) {
  for (const AlgorithmInfo& each : kAlgorithms) {
    if (algorithm == each.name) return true;
  }
  return false;
}

WireFormat wire_for(const Operation& operation, const CommunicatorOptions& options,
                    bool on_device) {
  const WireFormat allowed = operation.wire.value_or(options.wire);
  const bool gains = options.wire_on_all_links || on_device;  // "network" says: not within memory
  const size_t bytes = operation.count * size_bytes(operation.dtype);
  if (!gains || !reduces(operation.collective) || bytes < kSmallestLossyBytes ||
      !may_be_lossy(operation.op, operation.dtype)) {
    return WireFormat::kNative;
  }
  return allowed;
}

}  // namespace

void check_algorithm(const std::string& algorithm) {
  if (algorithm == "auto" || exists(algorithm)) return;
  std::string known = "auto";
  for (const AlgorithmInfo& each : kAlgorithms) {
    if (known.find(each.name) == std::string::npos) known += str(", ", each.name);
  }
  throw usage_error("algorithm '", algorithm, "' is not known; there are ", known);
}

Choice choose(const Operation& operation, const CommunicatorOptions& options, const HostFacts& host,
              const StagingGeometry* device) {
  const int world = host.world;
  const std::string& asked = operation.algorithm.empty() ? options.algorithm : operation.algorithm;
  if (!operation.algorithm.empty()) check_algorithm(operation.algorithm);
  const bool barrier = operation.collective == Collective::kBarrier;
  const Collective collective = barrier ? Collective::kAllReduce : operation.collective;
  // A name that this collective does not have (a ring asked for all-reduce says nothing about a
  // broadcast by double tree) leaves the choice to auto.
  int algorithm = asked == "auto" || barrier ? -1 : find_algorithm(collective, asked);
  const WireFormat wire = wire_for(operation, options, device != nullptr);
  const bool automatically = algorithm < 0;
  if (automatically) {
    algorithm =
        find_algorithm(collective, device != nullptr ? automatic_on_device(operation, wire, *device)
                                                     : automatic(operation, world));
  }
  if (wire == WireFormat::kInt8) {
    const ScheduleParams params{0, world, operation.root, 1};
    const int roundings = kAlgorithms[algorithm].roundings(params);
    if (roundings > kMaxInt8Roundings) {
      throw usage_error("wire int8 needs an algorithm of at most ", kMaxInt8Roundings,
                        " roundings, and ", kAlgorithms[algorithm].name, " over ", world,
                        " ranks rounds ", roundings, " times; use two_shot or auto");
    }
  }
  Choice choice{algorithm, wire};
  // An algorithm that the user names is run as its schedule says.
  if (automatically && device == nullptr && wire == WireFormat::kNative && options.path == "auto") {
    choice.path = choose_path(operation.collective, operation.count, size_bytes(operation.dtype),
                              !operation.counts.empty(), host);
  }
  return choice;
}

}  // namespace dpcomm
