#include "cuda/tickets.h"

namespace dpcomm {
namespace {

bool is_over(cudaEvent_t event) {
  const cudaError_t error = cudaEventQuery(event);
  if (error == cudaSuccess) return true;
  if (error == cudaErrorNotReady) {
    cudaGetLastError();
    return false;
  }
  check_cuda(error, "an operation on the CUDA device");
  return false;
}

}  // namespace

Tickets::~Tickets() {
  for (const Ticket& ticket : pending_) recycle(ticket);
  for (const Ticket& ticket : captured_) recycle(ticket);
  for (cudaEvent_t event : free_) cudaEventDestroy(event);
}

cudaEvent_t Tickets::event() {
  {
    const std::lock_guard lock(mutex_);
    if (!free_.empty()) {
      const cudaEvent_t event = free_.back();
      free_.pop_back();
      return event;
    }
  }
  cudaEvent_t event = nullptr;
  check_cuda(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "an event");
  return event;
}

void Tickets::give_back(cudaEvent_t event) {
  const std::lock_guard lock(mutex_);
  if (event != nullptr) free_.push_back(event);
}

void Tickets::recycle(const Ticket& ticket) {
  if (ticket.ready != nullptr) free_.push_back(ticket.ready);
  if (ticket.done != nullptr) free_.push_back(ticket.done);
}

void Tickets::add(const Ticket& ticket) {
  const std::lock_guard lock(mutex_);
  last_ = ticket.number;
  if (!captured_.empty() && captured_.front().capture != ticket.capture) {
    for (const Ticket& old : captured_) recycle(old);  // that capture has ended
    captured_.clear();
  }
  if (ticket.capture != 0) {
    captured_any_ = true;
    captured_.push_back(ticket);
  } else {
    pending_.push_back(ticket);
  }
}

void Tickets::lose() {
  const std::lock_guard lock(mutex_);
  lost_ = true;
}

/// With the mutex: lets go of what is complete.
void Tickets::retire() {
  if (lost_) throw internal_error("an operation on the CUDA device cannot be seen any more");
  while (!pending_.empty() && is_over(pending_.front().done)) {
    recycle(pending_.front());
    pending_.pop_front();
  }
}

Progress Tickets::progress(uint64_t number) {
  const std::lock_guard lock(mutex_);
  for (const Ticket& ticket : captured_) {
    if (ticket.number == number) return Progress::kInGraph;
  }
  retire();
  if (pending_.empty() || number < pending_.front().number) return Progress::kComplete;
  if (number > pending_.front().number) return Progress::kBehind;
  const cudaEvent_t ready = pending_.front().ready;
  return ready == nullptr || is_over(ready) ? Progress::kRunning : Progress::kBehind;
}

void Tickets::join(uint64_t number, cudaStream_t caller) {
  const std::lock_guard lock(mutex_);
  for (const Ticket& ticket : captured_) {
    if (ticket.number != number) continue;
    cudaStreamCaptureStatus status{};
    unsigned long long capture = 0;
    check_cuda(cudaStreamGetCaptureInfo(caller, &status, &capture), "the caller's stream");
    if (status == cudaStreamCaptureStatusActive && capture == ticket.capture) {
      check_cuda(cudaStreamWaitEvent(caller, ticket.done, 0), "waiting for an operation");
    }
    return;
  }
  retire();
  for (const Ticket& ticket : pending_) {
    if (ticket.number < number) continue;
    if (ticket.number > number) return;
    check_cuda(cudaStreamWaitEvent(caller, ticket.done, 0), "waiting for an operation");
    return;
  }
}

bool Tickets::captured_any() {
  const std::lock_guard lock(mutex_);
  return captured_any_;
}

uint64_t Tickets::last() {
  const std::lock_guard lock(mutex_);
  return last_;
}

}  // namespace dpcomm
