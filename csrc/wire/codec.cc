// Which kernels run: by instruction set of the CPU, or as DPCOMM_ISA asks.
#include "wire/codec.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "base/env.h"
#include "base/error.h"
#include "wire/kernel_table.h"

namespace dpcomm {
namespace {

#if defined(__x86_64__)
/// Not every compiler's __builtin_cpu_supports knows of it.
bool has_f16c() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}
#endif

/// The kernels of `isa`, or null where this build or this CPU has none.
const KernelTable* find_table(Isa isa) {
  if (isa == Isa::kScalar) return &kScalarKernels;
#if defined(__x86_64__)
  // __builtin_cpu_supports also asks whether the system saves the wide registers.
  if (isa == Isa::kAvx2 && __builtin_cpu_supports("avx2") && has_f16c()) {
    return &kAvx2Kernels;
  }
  if (isa == Isa::kAvx512 && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return &kAvx512Kernels;
  }
#endif
  return nullptr;
}

const KernelTable& table(Isa isa) {
  const KernelTable* found = find_table(isa);
  if (found == nullptr) throw usage_error("instruction set ", name(isa), " is not available here");
  return *found;
}

}  // namespace

bool isa_available(Isa isa) { return find_table(isa) != nullptr; }

Isa best_isa() {
  const std::string wanted = environment(Variable::ISA);
  for (Isa isa : {Isa::kAvx512, Isa::kAvx2, Isa::kScalar}) {
    if (wanted == name(isa)) {
      table(isa);
      return isa;
    }
    if (wanted == "auto" && isa_available(isa)) return isa;
  }
  throw usage_error("DPCOMM_ISA=", wanted, " is none of auto, scalar, avx2, avx512");
}

const Codec& tensor_codec(Dtype dtype, Isa isa) {
  return table(isa).tensor[static_cast<int>(dtype)];
}

const Codec& wire_codec(WireFormat wire, Dtype dtype, Isa isa) {
  if (wire == WireFormat::kNative) return tensor_codec(dtype, isa);
  if (!accumulates_in_fp32(dtype)) {
    throw usage_error("wire format ", name(wire), " does not carry ", name(dtype));
  }
  return table(isa).wire[static_cast<int>(wire)];
}

const AccumulatorOps& accumulator_ops(Dtype dtype, Isa isa) {
  return table(isa).ops[static_cast<int>(dtype)];
}

SumF32 sum_f32(Isa isa) { return table(isa).sum_f32; }
SumF32 sum_f32_streaming(Isa isa) { return table(isa).sum_f32_streaming; }
StreamCopy copy_streaming(Isa isa) { return table(isa).copy_streaming; }

}  // namespace dpcomm
