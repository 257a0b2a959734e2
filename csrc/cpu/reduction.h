// The reduction of whole contributions, in the order of ranks, rounded once: the arithmetic of the
// paths that read peers' contributions where they lie (local_paths.h).
#pragma once

#include <cstddef>
#include <vector>

#include "base/dtype.h"
#include "base/reduce_op.h"
#include "wire/codec.h"

namespace dpcomm {

/// One operation's reduction. Not thread-safe.
class Reduction {
 public:
  explicit Reduction(Isa isa);

  /// For contributions of `world` ranks from now on.
  void prepare(Dtype dtype, ReduceOp op, double factor, int world);

  /// Reduces n elements of each source, in the order given, and writes the result to each
  /// destination. A destination is a source, element for element, or overlaps none. Bits are those
  /// of the executor for one_shot and two_shot. `streams`: results go past the caches.
  void run(const std::byte* const* sources, int count, std::byte* const* destinations,
           int destination_count, size_t n, bool streams = false);

 private:
  void run_tile(const std::byte* const* sources, int count, std::byte* const* destinations,
                int destination_count, size_t first, size_t n);

  const Isa isa_;
  const SumF32 sum_f32_;
  const SumF32 sum_f32_streaming_;
  Dtype dtype_ = Dtype::kFloat32;
  ReduceOp op_ = ReduceOp::kSum;
  double factor_ = 1;
  int world_ = 1;
  size_t elem_bytes_ = 4;
  const Codec* tensor_ = nullptr;
  const Codec* accumulator_ = nullptr;
  const AccumulatorOps* arithmetic_ = nullptr;
  std::vector<std::byte> tile_, other_;
};

}  // namespace dpcomm
