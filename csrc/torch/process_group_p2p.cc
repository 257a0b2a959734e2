// Messages between two ranks, and several calls as one work.
#include "torch/process_group.h"
#include "torch/python_hooks.h"
#include "torch/work.h"

namespace dpcomm {
namespace {

const at::Tensor& only(const std::vector<at::Tensor>& tensors, const char* what) {
  if (tensors.size() == 1) return tensors[0];
  throw usage_error(what, " takes a list of one tensor, not of ", tensors.size());
}

constexpr std::chrono::milliseconds kTimeoutOfGroup(0);

}  // namespace

ProcessGroupDpcomm::WorkPointer ProcessGroupDpcomm::send(Tensors& tensors, int peer, int tag) {
  return start_call(c10d::OpType::SEND, "dpcomm:send", /*async=*/true, kTimeoutOfGroup,
                    [&](Call& call) { call.send(only(tensors, "send"), peer, tag); });
}

ProcessGroupDpcomm::WorkPointer ProcessGroupDpcomm::recv(Tensors& tensors, int peer, int tag) {
  return start_call(c10d::OpType::RECV, "dpcomm:recv", /*async=*/true, kTimeoutOfGroup,
                    [&](Call& call) {
                      if (peer < 0) throw usage_error("recv: rank ", peer, " is no other rank");
                      call.recv(only(tensors, "recv"), peer, tag);
                    });
}

ProcessGroupDpcomm::WorkPointer ProcessGroupDpcomm::recvAnysource(Tensors& tensors, int tag) {
  return start_call(
      c10d::OpType::RECVANYSOURCE, "dpcomm:recv_anysource", /*async=*/true, kTimeoutOfGroup,
      [&](Call& call) { call.recv(only(tensors, "recv"), Communicator::kAnySource, tag); });
}

void ProcessGroupDpcomm::startCoalescing() {
  const std::lock_guard<std::mutex> lock(window_mutex_);
  window_ = Window{std::this_thread::get_id(), {}};  // one that an exception left open ends here
  window_open_.store(true);
}

ProcessGroupDpcomm::WorkPointer ProcessGroupDpcomm::endCoalescing() {
  std::optional<Window> window;
  {
    const std::lock_guard<std::mutex> lock(window_mutex_);
    window.swap(window_);
    window_open_.store(false);
  }
  if (!window) throw_translated(usage_error("endCoalescing without startCoalescing"));
  if (window->works.size() == 1) return window->works[0];
  return c10::make_intrusive<CoalescedWork>(rank_, std::move(window->works));
}

void ProcessGroupDpcomm::add_to_window(const WorkPointer& work) {
  const std::lock_guard<std::mutex> lock(window_mutex_);
  if (window_ && window_->thread == std::this_thread::get_id()) window_->works.push_back(work);
}

}  // namespace dpcomm
