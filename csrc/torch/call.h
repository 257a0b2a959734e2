// A call of torch.distributed as operations of the core: what is checked, which dtype the bytes go
// by, and copies of tensors that the core cannot read or write where they are.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/SmallVector.h>

#include <chrono>
#include <optional>
#include <torch/csrc/distributed/c10d/Types.hpp>
#include <torch/csrc/distributed/c10d/Work.hpp>
#include <utility>
#include <vector>

#include "comm/communicator.h"

namespace dpcomm {

/// Built by the thread that calls; every function throws UsageError before anything is sent.
/// Tensors are dense, on one device, of any strides and dtype; those that are not contiguous are
/// gathered into a contiguous buffer first and scattered back by finish(). Copies on a device are
/// work of the stream that is current.
class Call {
 public:
  struct Group {
    int rank;
    int world;
  };

  /// `title` is "dpcomm:" and the name of the collective, for the profiler and for messages. An
  /// asynchronous call holds its tensors; a synchronous one relies on its caller to do so.
  Call(Group group, c10d::OpType type, const char* title, bool async,
       std::chrono::milliseconds timeout);

  void all_reduce(const at::Tensor& tensor, const c10d::ReduceOp& op);
  void reduce(const at::Tensor& tensor, const c10d::ReduceOp& op, int64_t root);
  void broadcast(const at::Tensor& tensor, int64_t root);
  void all_gather(const at::Tensor& output, const at::Tensor& input);
  void all_gather(const std::vector<at::Tensor>& outputs, const at::Tensor& input);
  void reduce_scatter(const at::Tensor& output, const at::Tensor& input, const c10d::ReduceOp& op);
  void reduce_scatter(const at::Tensor& output, const std::vector<at::Tensor>& inputs,
                      const c10d::ReduceOp& op);
  void barrier();

  /// Copies results from buffers to the tensors they belong to. Once, after all operations.
  void finish();
  /// Lets go of all tensors but the results.
  void release();
  /// Tells the allocator that `stream` uses all tensors of the call, which may be freed from now
  /// on.
  void record_on(const c10::Stream& stream) const;

  c10d::OpType type() const { return type_; }
  const char* title() const { return title_; }
  bool async() const { return async_; }
  /// Of the tensors; the CPU if there are none.
  c10::Device device() const { return device_.value_or(c10::Device(c10::kCPU)); }
  /// Of the first tensor; float if there are none.
  c10::ScalarType scalar_type() const { return scalar_type_; }
  bool has_copies() const { return !copies_.empty(); }
  c10::SmallVector<Operation, 1>& operations() { return operations_; }
  const c10::SmallVector<Operation, 1>& operations() const { return operations_; }
  /// The tensors that result() and the future give. Empty for a synchronous call.
  const std::vector<at::Tensor>& results() const { return results_; }

 private:
  const char* what() const;
  Operation& add(Collective collective);
  void set_dtype(Operation& operation, const at::Tensor& tensor) const;
  void set_reduction(Operation& operation, const at::Tensor& tensor,
                     const c10d::ReduceOp& op) const;
  void set_root(Operation& operation, int64_t root) const;
  void check(const at::Tensor& tensor);
  void check_output(const at::Tensor& tensor);
  void check_blocks(const at::Tensor& whole, const at::Tensor& block) const;
  void check_blocks(const std::vector<at::Tensor>& blocks, const at::Tensor& block) const;
  const void* read(const at::Tensor& tensor);
  void* write(const at::Tensor& tensor);
  void* update(const at::Tensor& tensor);
  const at::Tensor& copy_of(const at::Tensor& tensor);
  const at::Tensor& buffer_for(const at::Tensor& tensor);
  /// A buffer of one row for each rank.
  const at::Tensor& rows_for(const at::Tensor& block);
  void hold(const at::Tensor& tensor);
  void hold_result(const at::Tensor& tensor);

  Group group_;
  c10d::OpType type_;
  const char* title_;
  bool async_;
  std::optional<c10::Device> device_;
  c10::ScalarType scalar_type_ = c10::ScalarType::Float;
  std::chrono::milliseconds timeout_;
  c10::SmallVector<Operation, 1> operations_;
  std::vector<at::Tensor> results_;
  std::vector<at::Tensor> held_;
  std::vector<std::pair<at::Tensor, at::Tensor>> copies_;  // to, from
};

/// The wire format that calls of this thread ask for in place of their group's (dpcomm.wire).
std::optional<WireFormat>& thread_wire();

}  // namespace dpcomm
