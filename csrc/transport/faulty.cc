#include "transport/faulty.h"

#include <signal.h>
#include <unistd.h>

#include <cstdlib>
#include <random>
#include <sstream>
#include <thread>
#include <vector>

#include "transport/board.h"

namespace dpcomm {
namespace {

struct Faults {
  int rank = -1;
  uint64_t seed = 1;
  double stall = 0;
  uint64_t delay_us = 0;
  uint64_t drop = 0, retag = 0, shorten = 0, kill = 0, stop = 0;
};

Faults parse(const std::string& spec) {
  Faults faults;
  std::istringstream in(spec);
  for (std::string item; std::getline(in, item, ',');) {
    const size_t equals = item.find('=');
    const std::string key = item.substr(0, equals);
    const std::string text = equals == std::string::npos ? "" : item.substr(equals + 1);
    char* end = nullptr;
    const double value = std::strtod(text.c_str(), &end);
    if (text.empty() || *end != '\0')
      throw usage_error("DPCOMM_FAULTS: '", item, "' has no number");
    const auto whole = static_cast<uint64_t>(value);
    if (key == "rank") {
      faults.rank = static_cast<int>(value);
    } else if (key == "seed") {
      faults.seed = whole;
    } else if (key == "stall") {
      faults.stall = value;
    } else if (key == "delay_us") {
      faults.delay_us = whole;
    } else if (key == "drop") {
      faults.drop = whole;
    } else if (key == "retag") {
      faults.retag = whole;
    } else if (key == "shorten") {
      faults.shorten = whole;
    } else if (key == "kill") {
      faults.kill = whole;
    } else if (key == "stop") {
      faults.stop = whole;
    } else {
      throw usage_error("DPCOMM_FAULTS: '", key, "' is not a fault");
    }
  }
  return faults;
}

/// What the channels of one port share.
struct State {
  Faults faults;
  std::mt19937_64 random;
  uint64_t published = 0;

  /// Something is about to be published: this rank may be late, die or stop first.
  PublishFault publishes() {
    const uint64_t number = ++published;
    if (faults.delay_us > 0) {
      std::this_thread::sleep_for(std::chrono::microseconds(random() % faults.delay_us));
    }
    if (number == faults.kill) raise(SIGKILL);
    if (number == faults.stop) raise(SIGSTOP);
    if (number == faults.drop) return PublishFault::kDropped;
    return number == faults.retag ? PublishFault::kRetagged : PublishFault::kNone;
  }

  bool stalls() {
    return faults.stall > 0 && std::uniform_real_distribution<double>(0, 1)(random) < faults.stall;
  }
};

class FaultySender final : public SendChannel {
 public:
  FaultySender(SendChannel& inner, State& state) : inner_(inner), state_(state) {}

  std::byte* try_acquire() override { return state_.stalls() ? nullptr : inner_.try_acquire(); }

  void publish(uint32_t bytes, uint32_t tag) override {
    const PublishFault fault = state_.publishes();
    if (fault == PublishFault::kDropped) return;
    const bool shorten = state_.published == state_.faults.shorten && bytes > 0;
    inner_.publish(shorten ? bytes - 1 : bytes, fault == PublishFault::kRetagged ? tag ^ 1 : tag);
  }

 private:
  SendChannel& inner_;
  State& state_;
};

class FaultyReceiver final : public RecvChannel {
 public:
  FaultyReceiver(RecvChannel& inner, State& state) : inner_(inner), state_(state) {}
  bool try_peek(Message& message) override { return !state_.stalls() && inner_.try_peek(message); }
  void release() override { inner_.release(); }

 private:
  RecvChannel& inner_;
  State& state_;
};

class FaultyTransport final : public Transport {
 public:
  FaultyTransport(std::unique_ptr<Transport> inner, const Faults& faults)
      : inner_(std::move(inner)) {
    for (State* state : {&collectives_, &messages_}) {
      state->faults = faults;
      state->random.seed(faults.seed + 1000003 * inner_->rank());
    }
    if (Board* board = inner_->board()) {
      board->plant([this] { return collectives_.publishes(); });
    }
  }

  int rank() const override { return inner_->rank(); }
  int world() const override { return inner_->world(); }
  LaneGeometry geometry(int lane) const override { return inner_->geometry(lane); }
  int message_lane() const override { return inner_->message_lane(); }
  SendChannel& send_channel(int peer, int lane) override {
    senders_.push_back(
        std::make_unique<FaultySender>(inner_->send_channel(peer, lane), state_of(lane)));
    return *senders_.back();
  }
  RecvChannel& recv_channel(int peer, int lane) override {
    receivers_.push_back(
        std::make_unique<FaultyReceiver>(inner_->recv_channel(peer, lane), state_of(lane)));
    return *receivers_.back();
  }
  Board* board() override { return inner_->board(); }
  Reach reach() const override { return inner_->reach(); }
  size_t single_copy_bytes() const override { return inner_->single_copy_bytes(); }
  uint32_t process_id(int rank) const override { return inner_->process_id(rank); }
  uint32_t arm(Port port) override { return inner_->arm(port); }
  void disarm(Port port) override { inner_->disarm(port); }
  void sleep(Port port, uint32_t ticket, std::chrono::nanoseconds limit) override {
    // A stalled look may have missed a message that no ring will announce again.
    const bool stalls = collectives_.faults.stall > 0;
    inner_->sleep(port, ticket, stalls ? std::chrono::microseconds(50) : limit);
  }
  void wake(Port port) override { inner_->wake(port); }
  void announce(const OpRecord& record, Place place) override { inner_->announce(record, place); }
  OpRecord announced(int rank, Place place) const override {
    return inner_->announced(rank, place);
  }
  OpRecord announced_at(int rank, uint64_t sequence, Place place) const override {
    return inner_->announced_at(rank, sequence, place);
  }
  PeerState peer_state(int rank) const override { return inner_->peer_state(rank); }
  std::string describe(int rank) const override { return inner_->describe(rank); }
  void fail(const Failure& failure) override { inner_->fail(failure); }
  std::optional<Failure> failure() const override { return inner_->failure(); }
  bool failed() const override { return inner_->failed(); }
  void close() override { inner_->close(); }

 private:
  State& state_of(int lane) { return lane == message_lane() ? messages_ : collectives_; }

  std::unique_ptr<Transport> inner_;
  State collectives_, messages_;
  std::vector<std::unique_ptr<FaultySender>> senders_;
  std::vector<std::unique_ptr<FaultyReceiver>> receivers_;
};

}  // namespace

std::unique_ptr<Transport> make_faulty(std::unique_ptr<Transport> inner, const std::string& spec) {
  const Faults faults = parse(spec);
  if (faults.rank >= 0 && faults.rank != inner->rank()) return inner;
  return std::make_unique<FaultyTransport>(std::move(inner), faults);
}

}  // namespace dpcomm
