// The kernels of one instruction set, and who builds them.
//
// The kernels are templates over a vector trait (vector_*.h), compiled once per instruction set in
// kernels_<isa>.cc with that set's compiler flags. Two rules keep code for AVX out of the rest of
// the library, where a CPU without it would run it: everything that those files include and that
// has a body sits in an unnamed namespace, and they call no inline function or template of the
// standard library. The linker keeps one copy of a shared inline function, and it may be theirs.
#pragma once

#include "wire/codec.h"

namespace dpcomm {

struct KernelTable {
  Codec tensor[kDtypes];
  Codec wire[kWireFormats];  ///< kNative is not used: see tensor
  AccumulatorOps ops[kDtypes];
  SumF32 sum_f32;
  SumF32 sum_f32_streaming;
  StreamCopy copy_streaming;
};

extern const KernelTable kScalarKernels;
#if defined(__x86_64__)
extern const KernelTable kAvx2Kernels;
extern const KernelTable kAvx512Kernels;
#endif

}  // namespace dpcomm
