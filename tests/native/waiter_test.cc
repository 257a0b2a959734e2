// Waits (cpu/progress.h) over a transport that is told what happens when, and the floating-point
// state of the thread that runs an operation (law 13).
#include <cmath>
#include <vector>

#include "check.h"
#include "cpu/float_environment.h"
#include "cpu/progress.h"

namespace dpcomm {
namespace {

/// Counts, and checks that nobody sleeps without having looked after arm().
class ScriptedTransport final : public Transport {
 public:
  bool armed = false, looked = false, raised = false;
  int sleeps = 0, arms = 0, disarms = 0;

  void look() { looked = true; }

  int rank() const override { return 0; }
  int world() const override { return 2; }
  LaneGeometry geometry(int) const override { return {}; }
  SendChannel& send_channel(int, int) override { std::abort(); }
  RecvChannel& recv_channel(int, int) override { std::abort(); }
  int message_lane() const override { return 1; }
  uint32_t arm(Port) override {
    armed = true;
    looked = false;
    return static_cast<uint32_t>(++arms);
  }
  void disarm(Port) override {
    armed = false;
    ++disarms;
  }
  void sleep(Port, uint32_t ticket, std::chrono::nanoseconds) override {
    CHECK(armed);
    CHECK(looked);  // a message may have come between the last look and arm()
    CHECK_EQ(ticket, static_cast<uint32_t>(arms));
    armed = false;
    ++sleeps;
  }
  void wake(Port) override {}
  void announce(const OpRecord&, Place) override {}
  OpRecord announced(int, Place) const override { return {}; }
  PeerState peer_state(int) const override { return PeerState::kAlive; }
  std::string describe(int) const override { return ""; }
  void fail(const Failure&) override {}
  std::optional<Failure> failure() const override { return std::nullopt; }
  bool failed() const override { return raised; }
  void close() override {}
};

TEST(a_waiter_looks_once_more_before_it_sleeps) {
  for (const WaitPolicy policy : {WaitPolicy{0, 0}, WaitPolicy{1000, 0}, WaitPolicy{0, 1000}}) {
    ScriptedTransport transport;
    Waiter waiter(transport, policy);
    while (transport.sleeps < 5) {
      transport.look();
      waiter.pause();
    }
    CHECK_EQ(transport.arms, transport.sleeps);
  }
}

TEST(a_waiter_that_finds_something_after_arm_takes_it_back) {
  ScriptedTransport transport;
  {
    Waiter waiter(transport, WaitPolicy{0, 0});
    while (!transport.armed) {
      transport.look();
      waiter.pause();
    }
    waiter.progressed();
    CHECK_EQ(transport.disarms, 1);
    CHECK(!transport.armed);
    waiter.progressed();
    CHECK_EQ(transport.disarms, 1);
    while (!transport.armed) waiter.pause();
  }  // also when a throw ends the wait
  CHECK(!transport.armed);
  CHECK_EQ(transport.sleeps, 0);
}

TEST(a_waiter_reports_a_failure_at_once) {
  ScriptedTransport transport;
  transport.raised = true;
  Waiter waiter(transport, WaitPolicy{0, 1000});
  bool asked = false;
  for (int i = 0; i < 1000 && !asked; ++i) {
    transport.look();
    asked = waiter.pause();
  }
  CHECK(asked);
}

#if defined(__x86_64__)
TEST(denormals_are_kept_and_the_callers_state_comes_back) {
  constexpr unsigned kFlush = 0x8040;  // FTZ and DAZ, as torch.set_flush_denormal sets them
  const unsigned before = _mm_getcsr();
  _mm_setcsr(before | kFlush);
  volatile float least = 1e-40f;
  CHECK_EQ(least * 1.0f, 0.0f);
  {
    const FloatEnvironment environment;
    volatile float kept = least * 1.0f;
    CHECK(kept > 0.0f);
  }
  CHECK_EQ(_mm_getcsr() & kFlush, kFlush);
  CHECK_EQ(least * 1.0f, 0.0f);
  _mm_setcsr(before);
}
#endif

}  // namespace
}  // namespace dpcomm
