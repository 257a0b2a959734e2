// Groups made from a group, and what torch asks of a group as a whole.
#include <ATen/ATen.h>

#include <algorithm>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>

#include "torch/process_group.h"
#include "torch/python_hooks.h"

namespace dpcomm {
namespace {

[[noreturn]] void unsupported(const char* what) {
  throw_translated(usage_error("backend dpcomm does not have ", what, " (docs/torch.md)"));
}

std::string joined(const std::vector<int64_t>& ranks) {
  std::string text;
  for (const int64_t rank : ranks)
    text.append(text.empty() ? "" : ",").append(std::to_string(rank));
  return text;
}

}  // namespace

c10d::ErrorType ProcessGroupDpcomm::getError() {
  const std::exception_ptr failure = communicator_->failure();
  if (failure == nullptr) return c10d::ErrorType::SUCCESS;
  try {
    std::rethrow_exception(failure);
  } catch (const Error& error) {
    if (error.kind() == ErrorKind::kTimeout) return c10d::ErrorType::TIMEOUT;
    if (error.kind() == ErrorKind::kPeer) return c10d::ErrorType::REMOTE_ERROR;
  } catch (...) {
  }
  return c10d::ErrorType::COMM_ERROR;
}

ProcessGroupDpcomm::OptionsPointer ProcessGroupDpcomm::getBackendOptions() {
  CommunicatorOptions options = communicator_->options();
  options.timeout = std::chrono::milliseconds(timeout_.load());
  auto copy = c10::make_intrusive<GroupOptions>(std::move(options));
  copy->group_name = getGroupUid();
  for (const int rank : copy->communicator.global_ranks) {
    copy->global_ranks_in_group.push_back(rank);
  }
  return copy;
}

ProcessGroupDpcomm::BackendPointer ProcessGroupDpcomm::derive(
    const c10::intrusive_ptr<c10d::Store>& store, const std::vector<int>& ranks,
    const std::string& name, const OptionsPointer& opts) {
  CommunicatorOptions options = communicator_->options();
  options.timeout = std::chrono::milliseconds(timeout_.load());
  const std::vector<int> all = options.global_ranks;
  if (const auto* own = dynamic_cast<const GroupOptions*>(opts.get())) {
    options = own->of_group();
  } else if (opts != nullptr) {
    options.timeout = opts->timeout;
  }
  options.global_ranks.clear();
  for (const int rank : ranks) options.global_ranks.push_back(all.empty() ? rank : all[rank]);
  const auto place = std::find(ranks.begin(), ranks.end(), rank_);
  BackendPointer made;
  without_gil([&] {
    made = c10::make_intrusive<ProcessGroupDpcomm>(store, static_cast<int>(place - ranks.begin()),
                                                   static_cast<int>(ranks.size()), name,
                                                   std::move(options));
  });
  made->setGroupUid(name);
  return made;
}

ProcessGroupDpcomm::BackendPointer ProcessGroupDpcomm::split(
    const c10::intrusive_ptr<c10d::Store>& store, const std::vector<int>& ranks,
    const OptionsPointer& opts) {
  for (const int rank : ranks) {
    if (rank >= 0 && rank < size_ && std::count(ranks.begin(), ranks.end(), rank) == 1) continue;
    throw_translated(
        usage_error("split: ", rank, " is no rank of a group of ", size_, ", or is named twice"));
  }
  if (std::find(ranks.begin(), ranks.end(), rank_) == ranks.end()) return nullptr;
  {
    const std::lock_guard<std::mutex> lock(store_mutex_);
    if (last_split_ && last_split_->store == store && last_split_->ranks == ranks) {
      if (auto made = last_split_->backend.lock()) return made;
    }
  }
  const bool named = opts != nullptr && !opts->group_name.empty();
  BackendPointer made =
      derive(store, ranks, named ? opts->group_name : group_name_ + ":split", opts);
  const std::lock_guard<std::mutex> lock(store_mutex_);
  last_split_.emplace(Split{store, ranks, c10::weak_intrusive_ptr<c10d::Backend>(made)});
  return made;
}

ProcessGroupDpcomm::BackendPointer ProcessGroupDpcomm::merge(
    const c10::intrusive_ptr<c10d::Store>& store, const OptionsPointer& opts, const int& rank,
    const int& size) {
  CommunicatorOptions options = communicator_->options();
  options.timeout = opts != nullptr ? opts->timeout : std::chrono::milliseconds(timeout_.load());
  options.global_ranks.clear();  // of all jobs that join: nobody knows
  const bool named = opts != nullptr && !opts->group_name.empty();
  const std::string name = named ? opts->group_name : group_name_ + ":merge";
  BackendPointer made;
  without_gil([&] {
    made = c10::make_intrusive<ProcessGroupDpcomm>(store, rank, size, name, std::move(options));
  });
  return made;
}

ProcessGroupDpcomm::BackendPointer ProcessGroupDpcomm::shrink(
    const std::vector<int64_t>& ranks_to_exclude, int flags, const OptionsPointer& opts) {
  constexpr int kAbort = 1;  // torch's SHRINK_ABORT
  std::vector<int64_t> leaving = ranks_to_exclude;
  std::sort(leaving.begin(), leaving.end());
  for (const int64_t rank : leaving) {
    if (rank >= 0 && rank < size_ && rank != rank_) continue;
    throw_translated(
        usage_error("shrink without rank ", rank, ", called by rank ", rank_, " of ", size_));
  }
  std::vector<int> staying;
  for (int rank = 0; rank < size_; ++rank) {
    if (!std::binary_search(leaving.begin(), leaving.end(), rank)) staying.push_back(rank);
  }
  c10::intrusive_ptr<c10d::Store> store;
  {
    const std::lock_guard<std::mutex> lock(store_mutex_);
    store = store_;
  }
  if (store == nullptr) throw_translated(usage_error("shrink of a group that is shut down"));
  if ((flags & kAbort) != 0) abort();
  const std::string which = "dpcomm/shrink/" + joined(leaving) + "/";
  return derive(c10::make_intrusive<c10d::PrefixStore>(which, store), staying,
                group_name_ + ":shrink", opts);
}

void ProcessGroupDpcomm::registerOnCompletionHook(Completions::Hook&& hook) {
  // The hook holds a Python object: it is moved once, and never copied.
  const auto shared = std::make_shared<const Completions::Hook>(std::move(hook));
  translating([&] { completions_->set_hook(shared); });
  onCompletionHook_ = [shared](std::shared_ptr<c10d::WorkInfo> info) { (*shared)(info); };
}

void ProcessGroupDpcomm::waitForPendingWorks() {
  without_gil([this] {
    Communicator::about_to_block();
    if (!completions_->wait(python_hooks().interrupted))
      throw_translated(peer_error("interrupted"));
    synchronize_device();
  });
}

at::Tensor ProcessGroupDpcomm::allocateTensor(long size, at::TensorOptions options) {
  return at::empty({size}, options);
}

std::shared_ptr<c10::Allocator> ProcessGroupDpcomm::getMemAllocator() {
  unsupported("a memory allocator (mem_allocator)");
}
void ProcessGroupDpcomm::suspend() { unsupported("suspend"); }
void ProcessGroupDpcomm::resume() { unsupported("resume"); }
std::unordered_map<std::string, uint64_t> ProcessGroupDpcomm::getMemoryStats() {
  unsupported("memory statistics (dpcomm.stats() counts operations and bytes)");
}

}  // namespace dpcomm
