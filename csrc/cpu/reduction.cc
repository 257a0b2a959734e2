#include "cpu/reduction.h"

#include <algorithm>
#include <cstring>

namespace dpcomm {
namespace {

constexpr size_t kTileElems = 2048;  // the accumulators fit the L1 cache
constexpr size_t kMaxAccumulatorBytes = 8;

}  // namespace

Reduction::Reduction(Isa isa)
    : isa_(isa), sum_f32_(sum_f32(isa)), sum_f32_streaming_(sum_f32_streaming(isa)) {
  tile_.resize(kTileElems * kMaxAccumulatorBytes);
  other_.resize(kTileElems * kMaxAccumulatorBytes);
}

void Reduction::prepare(Dtype dtype, ReduceOp op, double factor, int world) {
  dtype_ = dtype;
  op_ = op;
  factor_ = factor;
  world_ = world;
  elem_bytes_ = size_bytes(dtype);
  tensor_ = &tensor_codec(dtype, isa_);
  accumulator_ = accumulates_in_fp32(dtype) ? &tensor_codec(Dtype::kFloat32, isa_) : tensor_;
  arithmetic_ = &accumulator_ops(dtype, isa_);
}

void Reduction::run(const std::byte* const* sources, int count, std::byte* const* destinations,
                    int destination_count, size_t n, bool streams) {
  if (dtype_ == Dtype::kFloat32 && (op_ == ReduceOp::kSum || op_ == ReduceOp::kAvg)) {
    const auto sum = streams ? sum_f32_streaming_ : sum_f32_;
    sum(reinterpret_cast<float* const*>(destinations), destination_count,
        reinterpret_cast<const float* const*>(sources), count, op_ == ReduceOp::kAvg ? world_ : 1,
        n);
    return;
  }
  for (size_t first = 0; first < n; first += kTileElems) {
    run_tile(sources, count, destinations, destination_count, first,
             std::min(kTileElems, n - first));
  }
}

void Reduction::run_tile(const std::byte* const* sources, int count, std::byte* const* destinations,
                         int destination_count, size_t first, size_t n) {
  const auto combine = static_cast<int>(combiner(op_));
  const size_t total = first + n;  // tensors have no header: the end does not matter
  std::byte* sum = tile_.data();
  if (op_ == ReduceOp::kPremulSum) {
    for (int i = 0; i < count; ++i) {
      std::byte* to = i == 0 ? sum : other_.data();
      tensor_->load(to, sources[i], total, first, n);
      arithmetic_->premultiply(to, factor_, n);
      if (i > 0) accumulator_->combine[combine](sum, to, n, 0, n);
    }
  } else {
    tensor_->load(sum, sources[0], total, first, n);
    for (int i = 1; i < count; ++i) tensor_->combine[combine](sum, sources[i], total, first, n);
  }
  if (op_ == ReduceOp::kAvg) arithmetic_->divide(sum, world_, n);
  tensor_->store(destinations[0], total, first, sum, n, false);
  const size_t offset = first * elem_bytes_;
  for (int i = 1; i < destination_count; ++i) {
    std::memcpy(destinations[i] + offset, destinations[0] + offset, n * elem_bytes_);
  }
}

}  // namespace dpcomm
