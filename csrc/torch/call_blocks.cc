// Calls whose tensors fall into one block for each rank.
#include <ATen/ATen.h>
#include <ATen/core/LegacyTypeDispatch.h>

#include <algorithm>
#include <numeric>

#include "torch/call.h"
#include "torch/copy.h"

namespace dpcomm {
namespace {

using Tensors = Call::Tensors;

bool overlap(const void* a, size_t a_bytes, const void* b, size_t b_bytes) {
  const auto a_first = reinterpret_cast<uintptr_t>(a), b_first = reinterpret_cast<uintptr_t>(b);
  return a_first < b_first + b_bytes && b_first < a_first + a_bytes;
}

/// True if the tensors lie one after the other, as the blocks of one buffer.
bool are_consecutive(const Tensors& blocks) {
  const std::byte* next = nullptr;
  for (const at::Tensor& block : blocks) {
    if (block.numel() == 0) continue;
    const auto* first = static_cast<const std::byte*>(block.const_data_ptr());
    if (!is_plain(block) || (next != nullptr && first != next)) return false;
    next = first + block.nbytes();
  }
  return true;
}

/// The first tensor that has elements; the first one if none has.
const at::Tensor& first_of(const Tensors& blocks) {
  for (const at::Tensor& block : blocks) {
    if (block.numel() > 0) return block;
  }
  return blocks[0];
}

int64_t elements(const Tensors& blocks) {
  return std::accumulate(blocks.begin(), blocks.end(), int64_t{0},
                         [](int64_t sum, const at::Tensor& block) { return sum + block.numel(); });
}

size_t bytes_of(const Tensors& blocks) { return elements(blocks) * blocks[0].element_size(); }

bool all_equal(const Tensors& blocks) {
  return std::all_of(blocks.begin(), blocks.end(),
                     [&](const at::Tensor& block) { return block.numel() == blocks[0].numel(); });
}

std::vector<size_t> counts_of(const Tensors& blocks, size_t each) {
  std::vector<size_t> counts;
  for (const at::Tensor& block : blocks) counts.push_back(block.numel() * each);
  return counts;
}

/// Calls `body` with each block and its part of `buffer`, in the shape of the block.
template <class Body>
void for_each_part(const at::Tensor& buffer, const Tensors& blocks, Body&& body) {
  int64_t first = 0;
  for (const at::Tensor& block : blocks) {
    body(block, buffer.narrow(0, first, block.numel()).view(block.sizes()));
    first += block.numel();
  }
}

}  // namespace

void Call::check_dtypes(const at::Tensor& a, const at::Tensor& b) const {
  if (a.scalar_type() == b.scalar_type()) return;
  throw usage_error(what(), ": input and output are ", c10::toString(a.scalar_type()), " and ",
                    c10::toString(b.scalar_type()));
}

void Call::check_whole(const at::Tensor& whole, const at::Tensor& block) const {
  check_dtypes(whole, block);
  if (whole.numel() != block.numel() * group_.world) {
    throw usage_error(what(), ": ", whole.numel(), " elements are not world_size ", group_.world,
                      " times ", block.numel());
  }
}

void Call::check_list(const Tensors& blocks, const at::Tensor& like) const {
  if (blocks.size() != static_cast<size_t>(group_.world)) {
    throw usage_error(what(), ": a list of ", blocks.size(), " tensors for world_size ",
                      group_.world);
  }
  for (const at::Tensor& block : blocks) {
    if (!block.defined() || block.scalar_type() != like.scalar_type()) {
      throw usage_error(what(), ": all tensors must be of one dtype (",
                        c10::toString(like.scalar_type()), ")");
    }
  }
}

void Call::check_list_of_all(const Tensors& blocks, const at::Tensor& own) {
  check_list(blocks, own);
  const int64_t place = blocks[group_.rank].numel();
  if (place != own.numel()) {
    throw usage_error(what(), ": the tensor of this rank, ", group_.rank, ", has ", own.numel(),
                      " elements, but its place in the list has ", place);
  }
  if (!all_equal(blocks)) check_on_cpu(" with blocks of unequal size");
}

void Call::check_equal(const Tensors& blocks, const at::Tensor& block) const {
  check_list(blocks, block);
  for (const at::Tensor& other : blocks) {
    if (other.numel() == block.numel()) continue;
    throw usage_error(what(), ": all tensors of the list must have the number of elements of the ",
                      "single one (", block.numel(), "), not ", other.numel());
  }
}

void Call::check_as_root(Collective collective, c10::function_ref<void()> check) const {
  try {
    check();
  } catch (const Error& error) {
    if (group_.world == 1) throw;
    throw OwnUsageError(collective, error.what());
  }
}

const at::Tensor& Call::buffer_for(const Tensors& blocks) {
  at::AutoDispatchBelowADInplaceOrView guard;
  return held_.emplace_back(at::empty({elements(blocks)}, blocks[0].options()));
}

const void* Call::read_blocks(const Tensors& blocks) {
  if (are_consecutive(blocks)) {
    for (const at::Tensor& block : blocks) hold(block);
    return first_of(blocks).const_data_ptr();
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  const at::Tensor buffer = buffer_for(blocks);
  for_each_part(buffer, blocks, [](const at::Tensor& block, const at::Tensor& part) {
    copy_elements(part, block);
  });
  return buffer.const_data_ptr();
}

/// A buffer too where the blocks overlap the input.
void* Call::write_blocks(const Tensors& blocks, const void* input, size_t input_bytes) {
  const at::Tensor& first = first_of(blocks);
  if (are_consecutive(blocks) &&
      !overlap(input, input_bytes, first.const_data_ptr(), bytes_of(blocks))) {
    return first.mutable_data_ptr();
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  const at::Tensor buffer = buffer_for(blocks);
  for_each_part(buffer, blocks, [this](const at::Tensor& block, const at::Tensor& part) {
    copies_.emplace_back(block, part);
  });
  return buffer.mutable_data_ptr();
}

void Call::all_gather(const at::Tensor& output, const at::Tensor& input) {
  check(input);
  check_output(output);
  check_whole(output, input);
  Operation& operation = add(Collective::kAllGather);
  set_dtype(operation, input);
  operation.output = write(output);
  operation.input = read(input);
  const auto* own = static_cast<const std::byte*>(operation.output) + group_.rank * input.nbytes();
  if (operation.input != own &&
      overlap(operation.input, input.nbytes(), operation.output, output.nbytes())) {
    operation.input = copy_of(input).const_data_ptr();
  }
  hold_result(output);
}

void Call::all_gather(const Tensors& outputs, const at::Tensor& input) {
  check(input);
  for (const at::Tensor& output : outputs) check_output(output);
  check_list_of_all(outputs, input);
  Operation& operation = add(Collective::kAllGather);
  const size_t each = set_dtype(operation, input);
  if (!all_equal(outputs)) operation.counts = counts_of(outputs, each);
  operation.input = read(input);
  operation.output = write_blocks(outputs, operation.input, input.nbytes());
  for (const at::Tensor& output : outputs) hold_result(output);
}

void Call::all_gather_uneven(const at::Tensor& all, const at::Tensor& block,
                             const std::vector<int64_t>& lengths) {
  Operation& operation = add(Collective::kAllGather);
  const size_t each = set_dtype(operation, block);
  const bool even =
      std::all_of(lengths.begin(), lengths.end(), [&](int64_t n) { return n == lengths[0]; });
  if (!even) {
    for (const int64_t length : lengths) operation.counts.push_back(length * each);
  }
  operation.input = held_.emplace_back(block).const_data_ptr();
  operation.output = held_.emplace_back(all).mutable_data_ptr();
}

void Call::reduce_scatter(const at::Tensor& output, const at::Tensor& input,
                          const c10d::ReduceOp& op) {
  check(input);
  check_output(output);
  check_whole(input, output);
  Operation& operation = add(Collective::kReduceScatter);
  set_reduction(operation, output, op);
  operation.input = read(input);
  operation.output = write(output);
  const auto* own = static_cast<const std::byte*>(operation.input) + group_.rank * output.nbytes();
  if (operation.output != own &&
      overlap(operation.output, output.nbytes(), operation.input, input.nbytes())) {
    operation.input = copy_of(input).const_data_ptr();
  }
  hold_result(output);
}

void Call::reduce_scatter(const at::Tensor& output, const Tensors& inputs,
                          const c10d::ReduceOp& op) {
  check_output(output);
  for (const at::Tensor& input : inputs) check(input);
  check_list_of_all(inputs, output);
  Operation& operation = add(Collective::kReduceScatter);
  set_reduction(operation, output, op);
  if (!all_equal(inputs)) operation.counts = counts_of(inputs, 1);
  operation.input = read_blocks(inputs);
  operation.output = write_blocks({output}, operation.input, bytes_of(inputs));
  hold_result(output);
}

void Call::gather(const Tensors& outputs, const at::Tensor& input, int64_t root) {
  check(input);
  check_on_cpu();
  Operation& operation = add(Collective::kGather);
  set_dtype(operation, input);
  set_root(operation, root);
  operation.input = read(input);
  if (root != group_.rank) return hold_result(input);
  check_as_root(Collective::kGather, [&] {
    for (const at::Tensor& output : outputs) check_output(output);
    check_equal(outputs, input);
  });
  operation.output = write_blocks(outputs, operation.input, input.nbytes());
  for (const at::Tensor& output : outputs) hold_result(output);
}

void Call::gather(const at::Tensor& output, const at::Tensor& input, int64_t root) {
  if (root != group_.rank) return gather(Tensors(), input, root);
  check(input);
  check_on_cpu();
  check_as_root(Collective::kGather, [&] {
    check_output(output);
    check_whole(output, input);
  });
  at::AutoDispatchBelowADInplaceOrView guard;
  at::Tensor whole = output;
  if (!is_plain(output)) {
    whole = buffer_for(output);
    copies_.emplace_back(output, whole);
  }
  gather(whole.view({group_.world, input.numel()}).unbind(0), input, root);
  results_.clear();
  hold_result(output);
}

void Call::scatter(const at::Tensor& output, const Tensors& inputs, int64_t root) {
  check_output(output);
  check_on_cpu();
  Operation& operation = add(Collective::kScatter);
  set_dtype(operation, output);
  set_root(operation, root);
  if (root == group_.rank) {
    check_as_root(Collective::kScatter, [&] {
      for (const at::Tensor& input : inputs) check(input);
      check_equal(inputs, output);
    });
    operation.input = read_blocks(inputs);
    operation.output = write_blocks({output}, operation.input, bytes_of(inputs));
  } else {
    operation.output = write(output);
  }
  hold_result(output);
}

void Call::all_to_all(const Tensors& outputs, const Tensors& inputs) {
  if (inputs.empty()) throw usage_error(what(), ": a list without tensors");
  for (const at::Tensor& input : inputs) check(input);
  for (const at::Tensor& output : outputs) check_output(output);
  check_list(inputs, inputs[0]);
  check_list(outputs, inputs[0]);
  check_on_cpu();
  const auto own = [this](const Tensors& list) { return list[group_.rank].numel(); };
  if (own(inputs) != own(outputs)) {
    throw usage_error(what(), ": ", own(inputs), " elements from this rank to itself, but ",
                      own(outputs), " to receive");
  }
  Operation& operation = add(Collective::kAllToAll);
  const size_t each = set_dtype(operation, inputs[0]);
  operation.counts = counts_of(inputs, each);
  operation.recv_counts = counts_of(outputs, each);
  operation.input = read_blocks(inputs);
  operation.output = write_blocks(outputs, operation.input, bytes_of(inputs));
  for (const at::Tensor& output : outputs) hold_result(output);
}

std::vector<size_t> Call::rows_to_elements(const at::Tensor& tensor, const Splits& splits,
                                           size_t each) const {
  const int64_t rows = tensor.dim() == 0 ? 1 : tensor.size(0);
  const size_t row = rows == 0 ? 0 : tensor.numel() / rows * each;
  const size_t world = group_.world;
  if (splits.empty()) {
    if (rows % group_.world != 0) {
      throw usage_error(what(), ": ", rows, " rows do not divide by world_size ", world,
                        " (pass split sizes)");
    }
    return std::vector<size_t>(world, rows / world * row);
  }
  const bool positive = std::all_of(splits.begin(), splits.end(), [](int64_t n) { return n >= 0; });
  const int64_t sum = std::accumulate(splits.begin(), splits.end(), int64_t{0});
  if (splits.size() != world || !positive || sum != rows) {
    throw usage_error(what(), ": ", splits.size(), " split sizes of together ", sum, " for ", world,
                      " ranks and ", rows, " rows (each zero or more)");
  }
  std::vector<size_t> counts;
  for (const int64_t n : splits) counts.push_back(n * row);
  return counts;
}

void Call::all_to_all(const at::Tensor& output, const at::Tensor& input,
                      const Splits& output_splits, const Splits& input_splits) {
  check(input);
  check_output(output);
  check_dtypes(input, output);
  check_on_cpu();
  Operation& operation = add(Collective::kAllToAll);
  const size_t each = set_dtype(operation, input);
  operation.counts = rows_to_elements(input, input_splits, each);
  operation.recv_counts = rows_to_elements(output, output_splits, each);
  const size_t sent = operation.counts[group_.rank], got = operation.recv_counts[group_.rank];
  if (sent != got) {
    throw usage_error(what(), ": ", sent / each, " elements from this rank to itself, but ",
                      got / each, " to receive");
  }
  operation.output = write(output);
  operation.input = read(input);
  if (overlap(operation.input, input.nbytes(), operation.output, output.nbytes())) {
    operation.input = copy_of(input).const_data_ptr();
  }
  hold_result(output);
}

}  // namespace dpcomm
