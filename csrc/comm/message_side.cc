#include "comm/message_side.h"

#include <pthread.h>
#include <sched.h>

#include <utility>

#include "base/error.h"

namespace dpcomm {
namespace {

constexpr std::chrono::seconds kIdleSleep{1};

}  // namespace

thread_local MessageSide* MessageSide::completing_ = nullptr;

MessageSide::MessageSide(std::shared_ptr<Transport> transport, const WaitPolicy& policy,
                         std::shared_ptr<Logbook> log)
    : transport_(std::move(transport)),
      log_(std::move(log)),
      busy_policy_(policy),
      patient_policy_(WaitPolicy::choose_patient()),
      messenger_(*transport_) {}

void MessageSide::check_arguments(bool sends, int peer, const void* data, size_t bytes) const {
  const char* what = sends ? "send" : "recv";
  const int world = transport_->world();
  const bool any = !sends && peer == Transfer::kAnyPeer;
  if (!any && (peer < 0 || peer >= world)) {
    throw usage_error(what, ": peer ", peer, " is not a rank of 0..", world - 1);
  }
  if (peer == transport_->rank() || world == 1) {
    throw usage_error(what, ": rank ", transport_->rank(),
                      world == 1 ? " is alone in its group" : " is this rank itself");
  }
  if (bytes > 0 && data == nullptr)
    throw usage_error(what, ": a null buffer for ", bytes, " bytes");
}

std::shared_ptr<Work> MessageSide::post(bool sends, int peer, uint32_t tag, void* data,
                                        size_t bytes, std::chrono::milliseconds limit) {
  check_arguments(sends, peer, data, bytes);
  const auto item = std::make_shared<Item>();
  item->sends = sends;
  item->peer = peer;
  item->tag = tag;
  item->data = static_cast<std::byte*>(data);
  item->bytes = bytes;
  item->limit = limit;
  item->deadline = Clock::now() + limit;
  item->work->count_waits(log_->exposed_wait_ns());

  posting_.fetch_add(1);
  std::unique_lock lock(mutex_);
  posting_.fetch_sub(1);
  if (closed_) throw usage_error("the communicator is closed");
  item->note = log_->message_given(sends, peer, tag, bytes, limit);
  if (!failure_) {
    if (const auto failure = transport_->failure()) end(*failure);
  }
  bool own = failure_.has_value();  // whether it is complete, or will never begin
  if (own) {
    item->error = failure_;
    log_->message_failed(item->note, *failure_);
  } else {
    hand_over();
    start_thread();
    try {
      messenger_.post(item);
    } catch (const Error& error) {
      end(Failure{error.kind(), error.what()});
    } catch (const std::exception& error) {
      end(Failure{ErrorKind::kInternal, error.what()});
    }
    auto& finished = messenger_.finished();
    own = !finished.empty() && finished.back() == item;
    if (own) {
      finished.pop_back();
      count(*item);
    }
    if (idle_ || failure_ || !finished.empty()) transport_->wake(Port::kMessages);
  }
  lock.unlock();
  if (own) {
    if (!item->error && !sends) item->work->set_source(item->source);
    item->work->complete(item->error);
  }
  return item->work;
}

void MessageSide::start_thread() {
  if (thread_.joinable()) return;
  thread_ = std::thread([self = shared_from_this()] {
    pthread_setname_np(pthread_self(), "dpcomm-messages");
    self->run();
  });
}

/// For a callback that may wait: the thread that runs it leaves everything else to a new one, and
/// ends after the callback. With the mutex held; at most once for each work.
void MessageSide::hand_over() {
  if (completing_ != this) return;
  completing_ = nullptr;
  if (closed_) {  // somebody joins this thread, or will
    std::thread([self = shared_from_this()] { self->run(); }).detach();
    return;
  }
  thread_.detach();
  start_thread();
}

void MessageSide::about_to_block() {
  MessageSide* side = completing_;
  if (side == nullptr) return;
  const std::lock_guard lock(side->mutex_);
  side->hand_over();
}

void MessageSide::run() {
  Waiter waiter(*transport_, patient_policy_, Port::kMessages);
  auto checked = Clock::now();
  for (;;) {
    const bool check = Clock::now() - checked > Waiter::kCheck;  // also where others' bytes move
    if (check) checked = Clock::now();
    bool moved, idle, streams;
    {
      const std::lock_guard lock(mutex_);
      moved = turn(check);
      idle_ = idle = messenger_.idle();
      streams = messenger_.streams();
      if (failure_ && complete_.empty()) return;
    }
    if (!complete_finished(waiter)) return;
    if (moved) {
      waiter.progressed();
      let_others_in();
    } else {
      waiter.use(streams ? busy_policy_ : patient_policy_);
      waiter.pause(idle ? kIdleSleep : Waiter::kCheck);
    }
  }
}

/// One look at everything, with the mutex held; true if anything moved.
bool MessageSide::turn(bool check) {
  if (failure_) return true;
  bool moved = false;
  try {
    if (transport_->failed()) {
      const Failure failure = transport_->failure().value_or(Failure());
      throw Error(failure.kind, failure.message);
    }
    moved = messenger_.progress();
    if (closed_) leave();
    if (check) messenger_.check();
  } catch (const Error& error) {
    end(Failure{error.kind(), error.what()});
  } catch (const std::exception& error) {
    end(Failure{ErrorKind::kInternal, error.what()});
  }
  for (auto& transfer : messenger_.finished()) {
    auto item = std::static_pointer_cast<Item>(std::move(transfer));
    count(*item);
    complete_.push_back(std::move(item));
  }
  messenger_.finished().clear();
  wire_bytes_.store(messenger_.wire_bytes());
  return moved || !complete_.empty();
}

/// Throws what ends the messages of a rank that closes: a death is told to all. With the mutex
/// held.
void MessageSide::leave() {
  if (const auto death = messenger_.death()) {
    transport_->fail(*death);
    throw Error(death->kind, death->message);
  }
  throw peer_error(transport_->describe(transport_->rank()), " has closed its communicator");
}

/// Ends what is on its way, on all ranks unless this one closes. With the mutex held.
void MessageSide::end(Failure failure) {
  const bool closes = closed_ && !transport_->failed();
  if (!closes) {
    transport_->fail(failure);
    failure = transport_->failure().value_or(failure);
  }
  for (auto& transfer : messenger_.abandon()) {
    auto item = std::static_pointer_cast<Item>(std::move(transfer));
    item->error = failure;
    if (closes) item->error->message = messenger_.describe(*item) + " ended: " + failure.message;
    log_->message_failed(item->note, *item->error);
    complete_.push_back(std::move(item));
  }
  failure_ = std::move(failure);
  if (!closes) log_->failed();
}

void MessageSide::count(const Item& item) {
  messages_.fetch_add(1);
  bytes_.fetch_add(item.bytes);
  log_->message_ended(item.note, item.sends ? item.peer : item.source);
}

/// Tells the works, without the mutex. False if another thread goes on in place of this one.
bool MessageSide::complete_finished(Waiter& waiter) {
  for (;;) {
    std::shared_ptr<Item> item;
    {
      const std::lock_guard lock(mutex_);
      if (complete_.empty()) return true;
      item = std::move(complete_.front());
      complete_.pop_front();
    }
    waiter.progressed();  // the bell is another thread's if this one hands over
    if (!item->error && !item->sends) item->work->set_source(item->source);
    completing_ = this;
    item->work->complete(std::move(item->error));
    item.reset();  // what the callbacks hold is released before anything else moves
    const bool handed_over = completing_ == nullptr;
    completing_ = nullptr;
    if (handed_over) return false;
  }
}

/// A mutex favours the thread that has just had it; here it waits until posts have had it.
void MessageSide::let_others_in() const {
  constexpr int kPatience = 100;
  for (int i = 0; i < kPatience && posting_.load() > 0; ++i) sched_yield();
}

void MessageSide::close() {
  std::thread ending;
  {
    const std::lock_guard lock(mutex_);
    if (closed_) return;
    closed_ = true;
    ending = std::move(thread_);
    transport_->wake(Port::kMessages);
  }
  if (!ending.joinable()) return;
  if (ending.get_id() == std::this_thread::get_id()) {
    ending.detach();
  } else {
    ending.join();
  }
}

}  // namespace dpcomm
