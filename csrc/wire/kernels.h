// All kernels of one vector trait as a table. Included by kernels_<isa>.cc only.
#pragma once

#include "wire/bf16.h"
#include "wire/fp16.h"
#include "wire/int8.h"
#include "wire/kernel_table.h"
#include "wire/native.h"
#include "wire/sum_f32.h"

namespace dpcomm {
namespace {

template <class Tensor>
constexpr void add_tensor(KernelTable& table, Dtype dtype) {
  table.tensor[static_cast<int>(dtype)] = Tensor::codec();
  table.ops[static_cast<int>(dtype)] = Tensor::ops();
}

template <class V>
constexpr KernelTable kernel_table() {
  KernelTable table{};
  add_tensor<FloatTensor<V, Float32>>(table, Dtype::kFloat32);
  add_tensor<FloatTensor<V, Float16>>(table, Dtype::kFloat16);
  add_tensor<FloatTensor<V, BFloat16>>(table, Dtype::kBFloat16);
  add_tensor<ExactTensor<double>>(table, Dtype::kFloat64);
  add_tensor<ExactTensor<int8_t>>(table, Dtype::kInt8);
  add_tensor<ExactTensor<uint8_t>>(table, Dtype::kUint8);
  add_tensor<ExactTensor<int16_t>>(table, Dtype::kInt16);
  add_tensor<ExactTensor<int32_t>>(table, Dtype::kInt32);
  add_tensor<ExactTensor<int64_t>>(table, Dtype::kInt64);
  add_tensor<ExactTensor<Bool>>(table, Dtype::kBool);
  table.wire[static_cast<int>(WireFormat::kFp16)] = Fp16Wire<V>::codec();
  table.wire[static_cast<int>(WireFormat::kBf16)] = Bf16Wire<V>::wire();
  table.wire[static_cast<int>(WireFormat::kInt8)] = Int8Wire::codec();
  table.sum_f32 = sum_f32_by<V>;
  table.sum_f32_streaming = sum_f32_streaming_by<V>;
  table.copy_streaming = copy_streaming_by<V>;
  return table;
}

}  // namespace
}  // namespace dpcomm
