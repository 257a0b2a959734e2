// A call of torch.distributed as operations of the core, or as a message: what is checked, which
// dtype the bytes go by, and copies of tensors that the core cannot read or write where they are.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/FunctionRef.h>
#include <c10/util/SmallVector.h>

#include <chrono>
#include <functional>
#include <optional>
#include <torch/csrc/distributed/c10d/Types.hpp>
#include <torch/csrc/distributed/c10d/Work.hpp>
#include <utility>
#include <vector>

#include "comm/communicator.h"

namespace dpcomm {

/// A UsageError that this rank alone has, while the others are about to wait for it: to be told to
/// all (Communicator::refuse).
class OwnUsageError : public Error {
 public:
  OwnUsageError(Collective collective, const std::string& text)
      : Error(ErrorKind::kUsage, text), collective(collective) {}
  const Collective collective;
};

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
  using Tensors = std::vector<at::Tensor>;
  using Splits = std::vector<int64_t>;

  /// A message to or from one rank, of which a call has at most one, and no operations then.
  struct Message {
    bool is_send = false;
    int peer = 0;  ///< or Communicator::kAnySource
    uint32_t tag = 0;
    void* data = nullptr;  ///< of a send: only read
    size_t bytes = 0;
  };

  /// `title` is "dpcomm:" and the name of the collective, for the profiler and for messages. An
  /// asynchronous call holds its tensors; a synchronous one relies on its caller to do so.
  Call(Group group, c10d::OpType type, const char* title, bool async,
       std::chrono::milliseconds timeout);

  void all_reduce(const at::Tensor& tensor, const c10d::ReduceOp& op);
  void reduce(const at::Tensor& tensor, const c10d::ReduceOp& op, int64_t root);
  void broadcast(const at::Tensor& tensor, int64_t root);
  void barrier();
  void send(const at::Tensor& tensor, int peer, int tag);
  void recv(const at::Tensor& tensor, int peer, int tag);

  // Blocks, one for each rank: of one tensor, or a list of tensors. In lists of all_gather,
  // reduce_scatter and all_to_all the blocks may be of different size.
  void all_gather(const at::Tensor& output, const at::Tensor& input);
  void all_gather(const Tensors& outputs, const at::Tensor& input);
  void reduce_scatter(const at::Tensor& output, const at::Tensor& input, const c10d::ReduceOp& op);
  void reduce_scatter(const at::Tensor& output, const Tensors& inputs, const c10d::ReduceOp& op);
  /// `outputs` and `inputs` count on the root only, whose mistakes in them are an OwnUsageError.
  void gather(const Tensors& outputs, const at::Tensor& input, int64_t root);
  void gather(const at::Tensor& output, const at::Tensor& input, int64_t root);
  void scatter(const at::Tensor& output, const Tensors& inputs, int64_t root);
  void all_to_all(const Tensors& outputs, const Tensors& inputs);
  /// Splits are rows (of dimension 0) for each rank; none: as many for each.
  void all_to_all(const at::Tensor& output, const at::Tensor& input, const Splits& output_splits,
                  const Splits& input_splits);
  /// Runs `check` of what only this rank, a root, can see: its errors are an OwnUsageError, unless
  /// it is alone.
  void check_as_root(Collective collective, c10::function_ref<void()> check) const;
  /// Gathers `block`, a contiguous tensor on the CPU of lengths[rank] elements, from every rank
  /// into the elements of `all`; neither is a result.
  void all_gather_uneven(const at::Tensor& all, const at::Tensor& block,
                         const std::vector<int64_t>& lengths);

  /// `last` is called by finish(), after the copies; `result` is what the call gives.
  void set_last(const at::Tensor& result, std::function<void()> last);

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
  bool has_copies() const { return !copies_.empty() || last_; }
  c10::SmallVector<Operation, 1>& operations() { return operations_; }
  const c10::SmallVector<Operation, 1>& operations() const { return operations_; }
  const std::optional<Message>& message() const { return message_; }
  std::chrono::milliseconds timeout() const { return timeout_; }
  /// The tensors that result() and the future give. Empty for a synchronous call.
  const std::vector<at::Tensor>& results() const { return results_; }

 private:
  const char* what() const;
  Operation& add(Collective collective);
  /// How many elements of the operation's dtype make one of `tensor`.
  size_t set_dtype(Operation& operation, const at::Tensor& tensor) const;
  void set_reduction(Operation& operation, const at::Tensor& tensor,
                     const c10d::ReduceOp& op) const;
  void set_root(Operation& operation, int64_t root) const;
  void check(const at::Tensor& tensor);
  void check_output(const at::Tensor& tensor);
  /// For what devices do not have.
  void check_on_cpu(const char* feature = "") const;
  void check_dtypes(const at::Tensor& a, const at::Tensor& b) const;
  void check_whole(const at::Tensor& whole, const at::Tensor& block) const;
  /// A list of one block for each rank, of the dtype of `like`.
  void check_list(const Tensors& blocks, const at::Tensor& like) const;
  /// The same, with `own`, the block of this rank, as large as its place in the list.
  void check_list_of_all(const Tensors& blocks, const at::Tensor& own);
  void check_equal(const Tensors& blocks, const at::Tensor& block) const;
  std::vector<size_t> rows_to_elements(const at::Tensor& tensor, const Splits& splits,
                                       size_t each) const;
  void set_message(const at::Tensor& tensor, bool is_send, int peer, int tag, void* data);

  // Where the bytes of a tensor are read or written: in place if they are its elements in order,
  // else in a buffer. Of blocks: in place if they lie one after the other.
  const void* read(const at::Tensor& tensor);
  void* write(const at::Tensor& tensor);
  void* update(const at::Tensor& tensor);
  const void* read_blocks(const Tensors& blocks);
  void* write_blocks(const Tensors& blocks, const void* input, size_t input_bytes);
  const at::Tensor& copy_of(const at::Tensor& tensor);
  const at::Tensor& buffer_for(const at::Tensor& tensor);
  const at::Tensor& buffer_for(const Tensors& blocks);
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
  std::optional<Message> message_;
  std::vector<at::Tensor> results_;
  std::vector<at::Tensor> held_;
  std::vector<std::pair<at::Tensor, at::Tensor>> copies_;  // to, from
  std::function<void()> last_;
};

/// True if the bytes of `tensor` in memory are its elements in order.
bool is_plain(const at::Tensor& tensor);

/// The wire format that calls of this thread ask for in place of their group's (dpcomm.wire).
std::optional<WireFormat>& thread_wire();

}  // namespace dpcomm
