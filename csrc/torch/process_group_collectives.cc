// The collectives of a process group.
#include <ATen/ATen.h>
#include <ATen/core/LegacyTypeDispatch.h>

#include <algorithm>
#include <numeric>

#include "torch/process_group.h"
#include "torch/python_hooks.h"

namespace dpcomm {
namespace {

/// The only one of a list with one entry for each device of a process, which is one.
template <class Entry>
const Entry& single(const std::vector<Entry>& entries, const char* what) {
  if (entries.size() != 1) {
    throw usage_error(what, " takes a list of one, not of ", entries.size());
  }
  return entries[0];
}

/// The list of one rank's blocks; only the root of a gather or scatter has one. No list is like an
/// empty one, which Call refuses.
const Call::Tensors& blocks_of_root(const Call& call, const std::vector<Call::Tensors>& lists,
                                    bool is_root, Collective collective) {
  static const Call::Tensors none;
  if (lists.empty() || (lists.size() == 1 && lists[0].empty())) return none;
  if (!is_root) throw usage_error(name(collective), ": only the root has a list of tensors");
  call.check_as_root(collective, [&] { single(lists, name(collective)); });
  return lists[0];
}

template <class Lists>
void require_pairs(const Lists& outputs, const std::vector<at::Tensor>& inputs, const char* what) {
  if (outputs.size() != inputs.size()) {
    throw usage_error(what, ": ", outputs.size(), " outputs for ", inputs.size(), " inputs");
  }
}

/// What ranks tell each other of a sparse tensor before its elements.
struct SparseShape {
  static constexpr int64_t kMaxDimensions = 29;
  static constexpr int64_t kLength = kMaxDimensions + 3;

  static at::Tensor row(const at::Tensor& tensor) {
    if (tensor.dim() > kMaxDimensions) {
      throw usage_error("all_reduce of a sparse tensor of ", tensor.dim(), " dimensions; ",
                        kMaxDimensions, " are the limit");
    }
    at::Tensor row = at::zeros({kLength}, at::kLong);
    auto* values = row.mutable_data_ptr<int64_t>();
    values[0] = tensor._nnz();
    values[1] = tensor.sparse_dim();
    values[2] = tensor.dim();
    for (int64_t i = 0; i < tensor.dim(); ++i) values[3 + i] = tensor.size(i);
    return row;
  }
};

/// Entries of each rank. Throws UsageError, on every rank the same, if the shapes differ.
std::vector<int64_t> entries_of(const at::Tensor& rows) {
  const auto* values = rows.const_data_ptr<int64_t>();
  std::vector<int64_t> entries;
  for (int64_t rank = 0; rank < rows.size(0); ++rank) {
    const int64_t* row = values + rank * SparseShape::kLength;
    if (!std::equal(row + 1, row + SparseShape::kLength, values + 1)) {
      throw usage_error("all_reduce: the sparse tensors of ranks 0 and ", rank,
                        " differ in sizes or in the number of sparse dimensions");
    }
    entries.push_back(row[0]);
  }
  return entries;
}

/// The sum of the ranks' entries, added in the order of ranks.
at::Tensor sum_of(const at::Tensor& like, const at::Tensor& indices, const at::Tensor& values,
                  const std::vector<int64_t>& entries) {
  const int64_t dims = like.sparse_dim();
  at::Tensor sum;
  int64_t first = 0;
  for (const int64_t count : entries) {
    const at::Tensor part = at::_sparse_coo_tensor_unsafe(
        indices.narrow(0, first * dims, count * dims).view({dims, count}),
        values.narrow(0, first, count), like.sizes(), like.options().layout(at::kSparse));
    part._coalesced_(true);
    sum = sum.defined() ? at::add(sum, part) : part;
    first += count;
  }
  return sum.coalesce();
}

}  // namespace

ProcessGroupDpcomm::WorkPointer ProcessGroupDpcomm::allreduce(Tensors& tensors,
                                                              const c10d::AllreduceOptions& opts) {
  if (tensors.size() == 1 && tensors[0].is_sparse()) return allreduce_sparse(tensors, opts);
  return start(c10d::OpType::ALLREDUCE, "dpcomm:all_reduce", opts,
               [&](Call& call) { call.all_reduce(single(tensors, "all_reduce"), opts.reduceOp); });
}

ProcessGroupDpcomm::WorkPointer ProcessGroupDpcomm::allreduce_coalesced(
    Tensors& tensors, const c10d::AllreduceCoalescedOptions& opts) {
  return start(c10d::OpType::ALLREDUCE_COALESCED, "dpcomm:all_reduce_coalesced", opts,
               [&](Call& call) {
                 for (const at::Tensor& tensor : tensors) call.all_reduce(tensor, opts.reduceOp);
               });
}

ProcessGroupDpcomm::WorkPointer ProcessGroupDpcomm::reduce(Tensors& tensors,
                                                           const c10d::ReduceOptions& opts) {
  return start(c10d::OpType::REDUCE, "dpcomm:reduce", opts, [&](Call& call) {
    call.reduce(single(tensors, "reduce"), opts.reduceOp, opts.rootRank);
  });
}

ProcessGroupDpcomm::WorkPointer ProcessGroupDpcomm::broadcast(Tensors& tensors,
                                                              const c10d::BroadcastOptions& opts) {
  return start(c10d::OpType::BROADCAST, "dpcomm:broadcast", opts,
               [&](Call& call) { call.broadcast(single(tensors, "broadcast"), opts.rootRank); });
}

ProcessGroupDpcomm::WorkPointer ProcessGroupDpcomm::allgather(std::vector<Tensors>& outputs,
                                                              Tensors& inputs,
                                                              const c10d::AllgatherOptions& opts) {
  return start(c10d::OpType::ALLGATHER, "dpcomm:all_gather", opts, [&](Call& call) {
    const at::Tensor& input = single(inputs, "all_gather");
    call.all_gather(single(outputs, "all_gather"), input);
  });
}

ProcessGroupDpcomm::WorkPointer ProcessGroupDpcomm::allgather_coalesced(
    std::vector<Tensors>& outputs, Tensors& inputs, const c10d::AllgatherOptions& opts) {
  return start(c10d::OpType::ALLGATHER_COALESCED, "dpcomm:all_gather_coalesced", opts,
               [&](Call& call) {
                 require_pairs(outputs, inputs, "all_gather_coalesced");
                 for (size_t i = 0; i < inputs.size(); ++i) call.all_gather(outputs[i], inputs[i]);
               });
}

ProcessGroupDpcomm::WorkPointer ProcessGroupDpcomm::_allgather_base(
    at::Tensor& output, at::Tensor& input, const c10d::AllgatherOptions& opts) {
  return start(c10d::OpType::_ALLGATHER_BASE, "dpcomm:all_gather_into_tensor", opts,
               [&](Call& call) { call.all_gather(output, input); });
}

ProcessGroupDpcomm::WorkPointer ProcessGroupDpcomm::allgather_into_tensor_coalesced(
    Tensors& outputs, Tensors& inputs, const c10d::AllgatherOptions& opts) {
  return start(c10d::OpType::COALESCED, "dpcomm:all_gather_into_tensor_coalesced", opts,
               [&](Call& call) {
                 require_pairs(outputs, inputs, "all_gather_into_tensor_coalesced");
                 for (size_t i = 0; i < inputs.size(); ++i) call.all_gather(outputs[i], inputs[i]);
               });
}

ProcessGroupDpcomm::WorkPointer ProcessGroupDpcomm::reduce_scatter(
    Tensors& outputs, std::vector<Tensors>& inputs, const c10d::ReduceScatterOptions& opts) {
  return start(c10d::OpType::REDUCE_SCATTER, "dpcomm:reduce_scatter", opts, [&](Call& call) {
    const at::Tensor& output = single(outputs, "reduce_scatter");
    call.reduce_scatter(output, single(inputs, "reduce_scatter"), opts.reduceOp);
  });
}

ProcessGroupDpcomm::WorkPointer ProcessGroupDpcomm::_reduce_scatter_base(
    at::Tensor& output, at::Tensor& input, const c10d::ReduceScatterOptions& opts) {
  return start(c10d::OpType::_REDUCE_SCATTER_BASE, "dpcomm:reduce_scatter_tensor", opts,
               [&](Call& call) { call.reduce_scatter(output, input, opts.reduceOp); });
}

ProcessGroupDpcomm::WorkPointer ProcessGroupDpcomm::reduce_scatter_tensor_coalesced(
    Tensors& outputs, Tensors& inputs, const c10d::ReduceScatterOptions& opts) {
  return start(c10d::OpType::REDUCE_SCATTER_TENSOR_COALESCED,
               "dpcomm:reduce_scatter_tensor_coalesced", opts, [&](Call& call) {
                 require_pairs(outputs, inputs, "reduce_scatter_tensor_coalesced");
                 for (size_t i = 0; i < inputs.size(); ++i) {
                   call.reduce_scatter(outputs[i], inputs[i], opts.reduceOp);
                 }
               });
}

ProcessGroupDpcomm::WorkPointer ProcessGroupDpcomm::barrier(const c10d::BarrierOptions& opts) {
  return start(c10d::OpType::BARRIER, "dpcomm:barrier", opts, [this](Call& call) {
    synchronize_device();
    call.barrier();
  });
}

ProcessGroupDpcomm::WorkPointer ProcessGroupDpcomm::gather(std::vector<Tensors>& outputs,
                                                           Tensors& inputs,
                                                           const c10d::GatherOptions& opts) {
  return start(c10d::OpType::GATHER, "dpcomm:gather", opts, [&](Call& call) {
    const Tensors& blocks =
        blocks_of_root(call, outputs, opts.rootRank == rank_, Collective::kGather);
    call.gather(blocks, single(inputs, "gather"), opts.rootRank);
  });
}

ProcessGroupDpcomm::WorkPointer ProcessGroupDpcomm::gather_single(at::Tensor& output,
                                                                  at::Tensor& input,
                                                                  const c10d::GatherOptions& opts) {
  return start(c10d::OpType::GATHER, "dpcomm:gather", opts,
               [&](Call& call) { call.gather(output, input, opts.rootRank); });
}

ProcessGroupDpcomm::WorkPointer ProcessGroupDpcomm::scatter(Tensors& outputs,
                                                            std::vector<Tensors>& inputs,
                                                            const c10d::ScatterOptions& opts) {
  return start(c10d::OpType::SCATTER, "dpcomm:scatter", opts, [&](Call& call) {
    const Tensors& blocks =
        blocks_of_root(call, inputs, opts.rootRank == rank_, Collective::kScatter);
    call.scatter(single(outputs, "scatter"), blocks, opts.rootRank);
  });
}

ProcessGroupDpcomm::WorkPointer ProcessGroupDpcomm::alltoall(Tensors& outputs, Tensors& inputs,
                                                             const c10d::AllToAllOptions& opts) {
  return start(c10d::OpType::ALLTOALL, "dpcomm:all_to_all", opts,
               [&](Call& call) { call.all_to_all(outputs, inputs); });
}

ProcessGroupDpcomm::WorkPointer ProcessGroupDpcomm::alltoall_base(
    at::Tensor& output, at::Tensor& input, std::vector<int64_t>& output_splits,
    std::vector<int64_t>& input_splits, const c10d::AllToAllOptions& opts) {
  return start(c10d::OpType::ALLTOALL_BASE, "dpcomm:all_to_all_single", opts,
               [&](Call& call) { call.all_to_all(output, input, output_splits, input_splits); });
}

void ProcessGroupDpcomm::monitoredBarrier(const c10d::BarrierOptions& opts,
                                          bool /*wait_all_ranks*/) {
  start_call(c10d::OpType::BARRIER, "dpcomm:monitored_barrier", /*async=*/false, opts.timeout,
             [this](Call& call) {
               synchronize_device();
               call.barrier();
             });
}

ProcessGroupDpcomm::WorkPointer ProcessGroupDpcomm::allreduce_sparse(
    Tensors& tensors, const c10d::AllreduceOptions& opts) {
  at::AutoDispatchBelowADInplaceOrView guard;
  at::Tensor given, own, row, rows;  // alive until all have been told
  const auto tell_shape = [&](Call& call) {
    given = single(tensors, "all_reduce");
    if (!given.defined() || !given.is_sparse() || !given.device().is_cpu()) {
      throw usage_error("all_reduce of sparse tensors takes those in COO layout on the CPU");
    }
    if (opts.reduceOp.op_ != c10d::ReduceOp::SUM) {
      throw usage_error("all_reduce of sparse tensors has the operator SUM only");
    }
    own = given.coalesce();
    rows = at::empty({size_, SparseShape::kLength}, at::kLong);
    row = SparseShape::row(own);
    call.all_gather(rows, row);
  };
  start_call(c10d::OpType::_ALLREDUCE_SPARSE, "dpcomm:all_reduce", /*async=*/false, opts.timeout,
             tell_shape);
  return start(c10d::OpType::_ALLREDUCE_SPARSE, "dpcomm:all_reduce", opts, [&](Call& call) {
    const std::vector<int64_t> entries = entries_of(rows);
    const int64_t total = std::accumulate(entries.begin(), entries.end(), int64_t{0});
    const int64_t dims = own.sparse_dim();
    const at::Tensor own_values = own._values().contiguous();
    std::vector<int64_t> shape = own_values.sizes().vec();
    const int64_t each = own.dense_dim() == 0
                             ? 1
                             : std::accumulate(shape.begin() + 1, shape.end(), int64_t{1},
                                               std::multiplies<int64_t>());
    shape[0] = total;
    const at::Tensor indices = at::empty({total * dims}, at::kLong);
    const at::Tensor values = at::empty(shape, own_values.options());
    std::vector<int64_t> index_lengths, value_lengths;
    for (const int64_t count : entries) {
      index_lengths.push_back(count * dims);
      value_lengths.push_back(count * each);
    }
    call.all_gather_uneven(indices, own._indices().contiguous().view(-1), index_lengths);
    call.all_gather_uneven(values, own_values, value_lengths);
    call.set_last(given, [given, own, indices, values, entries] {
      given.copy_(sum_of(own, indices, values, entries));
    });
  });
}

}  // namespace dpcomm
