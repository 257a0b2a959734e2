#include "torch/call.h"

#include <ATen/ATen.h>
#include <ATen/MemoryOverlap.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <tuple>

#include "torch/copy.h"

namespace dpcomm {
namespace {

std::optional<Dtype> core_dtype(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return Dtype::kFloat32;
    case at::kDouble:
      return Dtype::kFloat64;
    case at::kHalf:
      return Dtype::kFloat16;
    case at::kBFloat16:
      return Dtype::kBFloat16;
    case at::kChar:
      return Dtype::kInt8;
    case at::kByte:
      return Dtype::kUint8;
    case at::kShort:
      return Dtype::kInt16;
    case at::kInt:
      return Dtype::kInt32;
    case at::kLong:
      return Dtype::kInt64;
    case at::kBool:
      return Dtype::kBool;
    default:
      return std::nullopt;
  }
}

/// The integer type by which elements of `bytes` bytes are moved, and how many each takes.
std::pair<Dtype, size_t> movable_dtype(size_t bytes) {
  if (bytes % 8 == 0) return {Dtype::kInt64, bytes / 8};
  if (bytes == 4) return {Dtype::kInt32, 1};
  if (bytes == 2) return {Dtype::kInt16, 1};
  return {Dtype::kUint8, bytes};
}

ReduceOp core_op(const c10d::ReduceOp& op) {
  switch (op.op_) {
    case c10d::ReduceOp::SUM:
      return ReduceOp::kSum;
    case c10d::ReduceOp::AVG:
      return ReduceOp::kAvg;
    case c10d::ReduceOp::PRODUCT:
      return ReduceOp::kProduct;
    case c10d::ReduceOp::MIN:
      return ReduceOp::kMin;
    case c10d::ReduceOp::MAX:
      return ReduceOp::kMax;
    case c10d::ReduceOp::BAND:
      return ReduceOp::kBand;
    case c10d::ReduceOp::BOR:
      return ReduceOp::kBor;
    case c10d::ReduceOp::BXOR:
      return ReduceOp::kBxor;
    case c10d::ReduceOp::PREMUL_SUM:
      return ReduceOp::kPremulSum;
    default:
      throw usage_error("unknown ReduceOp ", static_cast<int>(op.op_));
  }
}

double premul_factor(const c10d::ReduceOp& op) {
  const auto* supplement = dynamic_cast<const c10d::NCCLPreMulSumSupplement*>(op.supplement_.get());
  if (supplement == nullptr) throw usage_error("PREMUL_SUM without a factor");
  return supplement->tensor_factor.defined() ? supplement->tensor_factor.item<double>()
                                             : supplement->double_factor;
}

/// PrivateUse1 is a device of somebody else's whose streams are CUDA's: if they are not, the engine
/// will find no device.
bool is_served(c10::Device device) {
  return device.is_cpu() || device.is_cuda() || device.is_privateuseone();
}

}  // namespace

bool is_plain(const at::Tensor& tensor) {
  return tensor.is_contiguous() && !tensor.is_conj() && !tensor.is_neg();
}

void copy_elements(const at::Tensor& to, const at::Tensor& from) {
  const at::ScalarType type = to.scalar_type();
  if (core_dtype(type) || c10::isComplexType(type)) {
    to.copy_(from);
    return;
  }
  const size_t bytes = to.element_size();
  const at::ScalarType carrier = bytes == 8   ? at::kLong
                                 : bytes == 4 ? at::kInt
                                 : bytes == 2 ? at::kShort
                                              : at::kByte;
  to.view(carrier).copy_(from.view(carrier));
}

std::optional<WireFormat>& thread_wire() {
  thread_local std::optional<WireFormat> wire;
  return wire;
}

Call::Call(Group group, c10d::OpType type, const char* title, bool async,
           std::chrono::milliseconds timeout)
    : group_(group),
      type_(type),
      title_(title),
      async_(async),
      timeout_(std::max(timeout, std::chrono::milliseconds(0))) {}

const char* Call::what() const { return title_ + sizeof("dpcomm:") - 1; }

Operation& Call::add(Collective collective) {
  Operation& operation = operations_.emplace_back();
  operation.collective = collective;
  operation.timeout = timeout_;
  return operation;
}

void Call::check(const at::Tensor& tensor) {
  if (!tensor.defined()) throw usage_error(what(), ": undefined tensor");
  if (tensor.layout() != at::kStrided || tensor.is_quantized()) {
    throw usage_error(what(), " wants dense tensors, not ", c10::str(tensor.layout()),
                      tensor.is_quantized() ? " (quantized)" : "");
  }
  const c10::Device device = tensor.device();
  if (device_ == device) return;
  if (device_) {
    throw usage_error(what(), ": tensors are on ", device_->str(), " and on ", device.str(),
                      "; all of one call have to be on the same device");
  }
  if (!is_served(device)) {
    throw usage_error(what(), ": a tensor is on ", device.str(),
                      ", but dpcomm serves tensors on the CPU and on CUDA devices");
  }
  device_ = device;
  scalar_type_ = tensor.scalar_type();
}

void Call::check_output(const at::Tensor& tensor) {
  check(tensor);
  if (at::has_internal_overlap(tensor) == at::MemOverlap::Yes) {
    throw usage_error(what(), ": several elements of an output share one place in memory ",
                      "(an expanded tensor?); pass a clone");
  }
}

void Call::check_on_cpu(const char* feature) const {
  if (device().is_cpu()) return;
  throw usage_error(what(), feature, ": tensors are on ", device().str(),
                    ", but dpcomm has it for tensors on the CPU only");
}

size_t Call::set_dtype(Operation& operation, const at::Tensor& tensor) const {
  size_t each = 1;
  if (const auto dtype = core_dtype(tensor.scalar_type())) {
    operation.dtype = *dtype;
  } else {
    std::tie(operation.dtype, each) = movable_dtype(tensor.element_size());
  }
  operation.count = tensor.numel() * each;
  return each;
}

void Call::set_reduction(Operation& operation, const at::Tensor& tensor,
                         const c10d::ReduceOp& op) const {
  const auto dtype = core_dtype(tensor.scalar_type());
  operation.op = core_op(op);
  if (!dtype || !is_supported(operation.op, *dtype)) {
    throw usage_error(what(), ": no reduction by ", name(operation.op), " of ",
                      c10::toString(tensor.scalar_type()),
                      tensor.is_complex() ? " (pass torch.view_as_real of it)" : "");
  }
  operation.dtype = *dtype;
  operation.count = tensor.numel();
  if (operation.op == ReduceOp::kPremulSum) operation.factor = premul_factor(op);
  if (thread_wire() && may_be_lossy(operation.op, operation.dtype)) operation.wire = thread_wire();
}

void Call::set_root(Operation& operation, int64_t root) const {
  if (root < 0 || root >= group_.world) {
    throw usage_error(what(), ": root ", root, " is no rank of a group of ", group_.world);
  }
  operation.root = static_cast<int>(root);
}

void Call::hold(const at::Tensor& tensor) {
  if (async_) held_.push_back(tensor);
}

void Call::hold_result(const at::Tensor& tensor) {
  if (async_) results_.push_back(tensor);
}

const at::Tensor& Call::buffer_for(const at::Tensor& tensor) {
  at::AutoDispatchBelowADInplaceOrView guard;
  return held_.emplace_back(at::empty(tensor.sizes(), tensor.options()));
}

const at::Tensor& Call::copy_of(const at::Tensor& tensor) {
  at::AutoDispatchBelowADInplaceOrView guard;
  const at::Tensor& buffer = buffer_for(tensor);
  copy_elements(buffer, tensor);
  return buffer;
}

const void* Call::read(const at::Tensor& tensor) {
  if (!is_plain(tensor)) return copy_of(tensor).const_data_ptr();
  hold(tensor);
  return tensor.const_data_ptr();
}

void* Call::write(const at::Tensor& tensor) {
  if (is_plain(tensor)) return tensor.mutable_data_ptr();
  const at::Tensor& buffer = buffer_for(tensor);
  copies_.emplace_back(tensor, buffer);
  return buffer.mutable_data_ptr();
}

void* Call::update(const at::Tensor& tensor) {
  if (is_plain(tensor)) return tensor.mutable_data_ptr();
  const at::Tensor& buffer = copy_of(tensor);
  copies_.emplace_back(tensor, buffer);
  return buffer.mutable_data_ptr();
}

void Call::all_reduce(const at::Tensor& tensor, const c10d::ReduceOp& op) {
  check_output(tensor);
  Operation& operation = add(Collective::kAllReduce);
  set_reduction(operation, tensor, op);
  operation.input = operation.output = update(tensor);
  hold_result(tensor);
}

void Call::reduce(const at::Tensor& tensor, const c10d::ReduceOp& op, int64_t root) {
  const bool is_root = root == group_.rank;
  is_root ? check_output(tensor) : check(tensor);
  Operation& operation = add(Collective::kReduce);
  set_reduction(operation, tensor, op);
  set_root(operation, root);
  if (is_root) {
    operation.input = operation.output = update(tensor);
  } else {
    operation.input = read(tensor);
  }
  hold_result(tensor);
}

void Call::broadcast(const at::Tensor& tensor, int64_t root) {
  const bool is_root = root == group_.rank;
  is_root ? check(tensor) : check_output(tensor);
  Operation& operation = add(Collective::kBroadcast);
  set_dtype(operation, tensor);
  set_root(operation, root);
  if (is_root) {
    operation.input = read(tensor);
    operation.output = const_cast<void*>(operation.input);  // in place: nothing is written
  } else {
    operation.output = write(tensor);
  }
  hold_result(tensor);
}

void Call::barrier() { add(Collective::kBarrier); }

void Call::send(const at::Tensor& tensor, int peer, int tag) {
  check(tensor);
  set_message(tensor, true, peer, tag, const_cast<void*>(read(tensor)));
}

void Call::recv(const at::Tensor& tensor, int peer, int tag) {
  check_output(tensor);
  set_message(tensor, false, peer, tag, write(tensor));
}

void Call::set_message(const at::Tensor& tensor, bool is_send, int peer, int tag, void* data) {
  check_on_cpu();
  if (tag < 0) throw usage_error(what(), ": the tag ", tag, " is negative");
  const bool any = peer == Communicator::kAnySource && !is_send;
  if (!any && (peer < 0 || peer >= group_.world || peer == group_.rank)) {
    throw usage_error(what(), ": rank ", peer, " is no other rank of a group of ", group_.world);
  }
  message_ = Message{is_send, peer, static_cast<uint32_t>(tag), data, tensor.nbytes()};
  hold_result(tensor);
}

void Call::set_last(const at::Tensor& result, std::function<void()> last) {
  last_ = std::move(last);
  hold_result(result);
}

void Call::finish() {
  if (!has_copies()) return;
  at::AutoDispatchBelowADInplaceOrView guard;
  for (auto& [to, from] : copies_) copy_elements(to, from);
  if (last_) last_();
}

void Call::release() {
  copies_.clear();
  held_.clear();
  last_ = nullptr;
}

void Call::record_on(const c10::Stream& stream) const {
  const c10::impl::VirtualGuardImpl device(stream.device_type());
  const auto record = [&](const at::Tensor& tensor) {
    device.recordDataPtrOnStream(tensor.storage().data_ptr(), stream);
  };
  for (const at::Tensor& tensor : held_) record(tensor);
  for (const at::Tensor& tensor : results_) record(tensor);
}

}  // namespace dpcomm
